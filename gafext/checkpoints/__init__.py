"""Checkpoints of a pipeline: loading and saving, adapters, what a file is, and how much memory a run takes."""
