"""Tests of dist_moe.balance."""
