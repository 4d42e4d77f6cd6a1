"""Labeled examples: where they come from, how they are tokenized, and the order in which they are read."""
