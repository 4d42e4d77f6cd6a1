"""The sections of the jobs that are submitted to a scheduler."""
