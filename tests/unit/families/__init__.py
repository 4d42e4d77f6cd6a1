"""Tests of dist_moe.families."""
