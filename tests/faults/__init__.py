"""The fault campaign: what is done to a run, the proof that it was done, and what became of the run."""
