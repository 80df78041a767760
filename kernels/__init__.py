"""Models of 8 or 4 bits that write on a CPU: C kernels, and what puts them into a model."""
