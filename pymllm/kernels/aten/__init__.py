"""Kernels made of PyTorch's own operators."""
