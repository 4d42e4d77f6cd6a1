"""The launchers, one file each: the command that starts the workers, or the objects that a scheduler is given."""
