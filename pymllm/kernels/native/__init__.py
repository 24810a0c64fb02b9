"""Kernels of the C++ extension, one file an operation and a kind of weight."""
