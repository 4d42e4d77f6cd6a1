"""DeepSpeed, which only two modules import, and what a run holds of it."""
