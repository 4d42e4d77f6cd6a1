"""Checkpoints: written while training continues, independent of the layout, verified."""
