"""Training of multi-view checkpoints on folders of posed pictures: `gafext train`."""
