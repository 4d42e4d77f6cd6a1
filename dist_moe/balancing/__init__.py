"""Balancing: counts and measures of the load, the losses of routing, and the balancer that applies a policy."""
