"""Text to batches: sources, tokenizers, tokens in memory-mapped files, and the endless stream of rows."""
