"""The MPI backend under a real mpirun."""
