"""Tests of launching: commands, the kernel's table of processes, and who is named as the first to fail."""
