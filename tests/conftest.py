"""What all tests share."""

import os

import pytest
import torch

# Tiny matrices: more threads only wait for each other, the more so with several test workers on few cores.
torch.set_num_threads(1)
# Without a GPU, Triton's interpreter runs the GPU kernels. It must be asked for before Triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def torch_threads():
    """Sets torch's number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
