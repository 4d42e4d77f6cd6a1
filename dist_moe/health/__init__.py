"""Checks on a run in progress: skipped steps, diverging replicas, hangs, requests to stop."""
