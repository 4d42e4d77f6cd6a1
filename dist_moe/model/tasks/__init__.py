"""Tasks: a model and its loss in one module, because the engine runs one forward with one output."""
