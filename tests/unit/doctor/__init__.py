"""Tests of dist_moe.doctor."""
