"""Tests that run on several ranks, and the pool of worker processes that serves them."""
