"""Checks of a user's own configuration and machines before a long run, each with its remedy."""
