"""Observability: metrics and their records on disk, TensorBoard, the terminal and load alerts."""
