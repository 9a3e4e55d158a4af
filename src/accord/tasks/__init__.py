"""Simulated tasks: worlds whose true objective is known exactly. Free of torch; they speak only in `accord.records`."""
