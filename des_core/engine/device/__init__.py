"""The id side and the rows of a worker on a GPU: kernels in Triton, with the same rows as the CPU's table."""
