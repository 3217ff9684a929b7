"""Many portraits: read, encoded, decoded and saved while others are denoised, each into a folder of its own."""
