"""Tests of dist_moe.moe."""
