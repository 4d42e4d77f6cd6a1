"""Sources of text that are packages of an index."""
