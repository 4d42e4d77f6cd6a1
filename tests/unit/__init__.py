"""Tests of one process, in folders that mirror the package."""
