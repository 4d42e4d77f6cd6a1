"""Saving and loading checkpoints, beside DeepSpeed's own."""
