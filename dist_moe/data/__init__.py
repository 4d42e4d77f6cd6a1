"""Turns text into batches: sources, tokenizers, memory-mapped token files, and the endless stream of rows."""
