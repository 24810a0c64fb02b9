"""The reference kernels: the plain formula of an operation, which runs everything, slowly."""
