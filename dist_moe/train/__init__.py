"""Training: the engine, the step, the loop around it, and what is left behind on disk."""
