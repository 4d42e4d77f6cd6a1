"""Tests of the studies that are grids of runs."""
