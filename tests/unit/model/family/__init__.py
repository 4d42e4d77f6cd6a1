"""Tests of dist_moe.model."""
