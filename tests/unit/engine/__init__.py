"""Unit tests of `dist_moe.engine`."""
