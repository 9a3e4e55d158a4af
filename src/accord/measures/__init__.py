"""Statistics and text measures: pure Python and numpy, used by every stage. Torch-free."""
