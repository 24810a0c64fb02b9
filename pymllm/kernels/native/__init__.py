"""The kernels of the C++ extension, a file for each operation and kind of weight."""
