"""Unit tests of `dist_moe.balance.rules`."""
