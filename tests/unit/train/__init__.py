"""Tests of dist_moe.train."""
