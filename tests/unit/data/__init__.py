"""Tests of dist_moe.data."""
