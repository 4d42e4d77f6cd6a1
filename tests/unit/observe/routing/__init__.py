"""Tests of dist_moe.observe.routing."""
