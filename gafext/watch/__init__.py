"""What a run says about itself while it runs: time and peak memory of its stages, progress, previews."""
