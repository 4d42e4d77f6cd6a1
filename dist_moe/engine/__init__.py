"""DeepSpeed behind one importer, and what a run holds of it."""
