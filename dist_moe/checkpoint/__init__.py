"""Checkpoints: written while training continues, independent of the parallel layout, verified."""
