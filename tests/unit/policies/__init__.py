"""Tests of dist_moe.policies."""
