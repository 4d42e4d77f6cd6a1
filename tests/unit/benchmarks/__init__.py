"""Tests of the benchmark's statistics, comparison and control of live programs."""
