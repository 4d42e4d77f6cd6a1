"""Tests of dist_moe/attach."""
