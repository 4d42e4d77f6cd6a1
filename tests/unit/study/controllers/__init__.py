"""Tests of the study of controllers."""
