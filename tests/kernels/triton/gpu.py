"""Where the tests of GPU kernels run: on the GPU, or in Triton's interpreter on the CPU, as for an sm90."""

import pytest
import torch

from pymllm.kernels.hardware import probe_device

pytest.importorskip("triton")

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DEVICE = probe_device("cuda" if torch.cuda.is_available() else "cuda:sm90")
FLOATS = (torch.bfloat16, torch.float16)
# One rounding: half a unit on a GPU. The interpreter truncates float32 to bfloat16, which is a whole one.
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8 if torch.cuda.is_available() else 2.0**-7}


def randn(*shape, seed=0, dtype=torch.float32):
    """The same numbers on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(HERE)


def moved(packed):
    return {name: tensor.to(HERE) for name, tensor in packed.items()}
