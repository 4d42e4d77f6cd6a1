"""Unit tests of `dist_moe.worker`."""
