"""What is measured about Accord, each with a command of its own: `python -m benchmarks.NAME --help`."""
