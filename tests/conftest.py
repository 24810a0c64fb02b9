"""What all tests share."""

import torch

# Tiny matrices: more threads only wait for each other, the more so with several test workers on few cores.
torch.set_num_threads(1)
