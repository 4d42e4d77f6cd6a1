"""Tests of dist_moe.observe.pictures."""
