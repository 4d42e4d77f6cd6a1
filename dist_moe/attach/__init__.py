"""Balancing and counting of the load in training loops of other frameworks."""
