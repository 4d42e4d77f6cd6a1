"""Tests of the configuration: its fields, reading, and checking."""
