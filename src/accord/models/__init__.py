"""Models: token layouts, token scores, loading and saving."""
