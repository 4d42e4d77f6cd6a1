"""Routers and experts of families that the package knows by their records alone."""
