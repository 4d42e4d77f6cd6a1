"""Tests of the place of a process, of the mesh, and of how a worker reports a failure."""
