"""Labeled examples."""
