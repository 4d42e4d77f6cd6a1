"""Checks of a configuration beyond its fields: what will be built is tried, and what it names is looked at."""
