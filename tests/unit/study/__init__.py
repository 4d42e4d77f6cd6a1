"""Tests of dist_moe.study."""
