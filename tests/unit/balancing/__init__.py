"""Tests of dist_moe.balancing."""
