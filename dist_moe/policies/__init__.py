"""Balancing policies, one file each: its fields in the configuration, what it goes with, and its pure update rule.

Every module here is imported without torch, because the configuration is read by programs that never load it.
"""
