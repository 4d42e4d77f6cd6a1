"""Parity: one config gives the same losses on every layout and launcher, shown by training on all of them."""
