"""Accord against its peers at the same work: the same weights, the same batches, the same updates."""
