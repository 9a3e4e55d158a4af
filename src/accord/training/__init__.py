"""Training: the loop and everything that makes it survive a kill (checkpoints, the run folder, signals)."""
