"""Turns a checked configuration into the command of a launcher, and follows the processes that it starts."""
