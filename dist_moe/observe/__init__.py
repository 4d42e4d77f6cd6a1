"""Sight of a run: metrics, their records on disk, TensorBoard and the console."""
