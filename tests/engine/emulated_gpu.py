"""A GPU that is none: the CPU, which says that it is an sm90, so that models get the kernels that they get there.

Triton's interpreter runs these kernels. `captured` stands for a CUDA graph: it watches what the step does while it is
captured, and runs it again to replay it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pymllm.api import llm
from pymllm.kernels import hardware, recurrence
from pymllm.kernels.attention import AttentionStep
from pymllm.kernels.triton.launch import Kernel
from pymllm.layers.rotary_embedding import RotaryEmbedding


@dataclass(frozen=True)
class EmulatedGPU(hardware.Device):
    """An sm90 whose memory is the CPU's."""

    @property
    def torch_device(self):
        return torch.device("cpu")

    @property
    def spec(self):
        return "cpu"


def emulated_device(*_, **__):
    sm90 = hardware.ARCHITECTURES["sm90"]
    return EmulatedGPU("cuda", "an emulated sm90", capability=(9, 0), architecture=sm90, processors=4)


@pytest.fixture
def emulated_gpu(monkeypatch):
    """Has "cpu" mean the emulated GPU, for one test."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled, not interpreted, beside a GPU")
    launch = Kernel.launch

    def unseen(self, *given, **constants):
        # What the interpreter does with torch's operations is no part of the step.
        with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
            launch(self, *given, **constants)

    monkeypatch.setattr(Kernel, "launch", unseen)
    # On a GPU nobody looks at these.
    for look in ("slots", "check_tokens"):
        monkeypatch.setattr(AttentionStep, look, lambda *_: None)
    monkeypatch.setattr(recurrence, "_check_slots", lambda *_: None)
    monkeypatch.setattr(AttentionStep, "stored_slots", lambda step, *_: step.slot_mapping)
    monkeypatch.setattr(hardware, "Device", emulated_device)
    monkeypatch.setattr(llm, "measure_cache", lambda plan, *_: plan)  # nobody tells how much memory is free
    hardware._known_device.cache_clear()
    yield
    hardware._known_device.cache_clear()


class LooksAtTheHost(Exception):
    """A copy between a GPU and the host, or a wait for it, within a step."""


FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "eye",
    "from_numpy",
    "frombuffer",
    "full",
    "linspace",
    "ones",
    "zeros",
)
FACTORIES = {getattr(torch, name) for name in (*FACTORIES, "tensor", "rand", "randn", "scalar_tensor")}
READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.cpu, torch.Tensor.item)
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class NoHost(TorchFunctionMode):
    """A guard against Python that reads a tensor, and against tensors that Python makes on the host."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READS:
            raise LooksAtTheHost(f"{func.__name__} reads a tensor")
        if func is torch.tensor or (func in FACTORIES and (kwargs or {}).get("device") is None):
            raise LooksAtTheHost(f"{func.__name__} makes a tensor on the host")
        return func(*args, **(kwargs or {}))


class NoWaits(TorchDispatchMode):
    """A guard against operations whose result, or its shape, follows from numbers in a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().removeprefix("aten::").partition(".")[0] in INDEXING:
            # Rows taken by number have a known shape, rows taken by a mask do not.
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        else:
            waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if waits:
            raise LooksAtTheHost(f"{func} depends on numbers in a tensor")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def guarded():
    """Refuse whatever a capture refuses."""
    with NoHost(), NoWaits():
        yield


def settle(llm):
    """Give a model all that it has made on a GPU once it has read a prompt, where a CPU makes less."""
    for module in llm.model.modules():
        if isinstance(module, RotaryEmbedding):
            module._table(module.max_position, torch.device("cpu"))
    return llm


def captured(run):
    """Stand for a CUDA graph: watch the step as a capture does, and run it again for each replay."""
    with guarded():
        logits = run().clone()
    return lambda: logits.copy_(run())
