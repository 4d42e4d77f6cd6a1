"""Unit tests of `dist_moe.checkpoint`."""
