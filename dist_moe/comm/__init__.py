"""Process groups, the mesh of ranks, and the collectives between them."""
