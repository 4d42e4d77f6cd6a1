"""Tests of dist_moe/replace."""
