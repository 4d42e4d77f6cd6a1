"""Balancing: measures of the load, update rules, and the state that carries the selection bias."""
