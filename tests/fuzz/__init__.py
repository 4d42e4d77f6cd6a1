"""Feeds random and damaged input to everything that reads input: `python -m tests.fuzz`."""
