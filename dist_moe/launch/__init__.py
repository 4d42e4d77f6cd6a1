"""Builds the command of a launcher from a configuration, and supervises the processes that it starts."""
