"""A backend of torch.distributed over MPI."""
