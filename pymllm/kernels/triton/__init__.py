"""GPU kernels in Triton, one file a family.  Nothing here imports Triton before a kernel is launched or compiled."""
