"""Running a torch module on example inputs, and what its linear layers see then."""

# I in_features

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.errors import ConfigError
from pymllm.quantization.rounding.calibrated import InputStatistics

ALGORITHMS = ("gptq", "clip")
MOST_BYTES = 2 << 30  # of statistics at a time; what is left waits for another run over the inputs


def read_calibration(calibration: Iterable[Any], algorithm: str, act_order: bool) -> list[Any]:
    """The example inputs, which are gone through several times.  ConfigError for none, or an unknown algorithm."""
    if algorithm not in ALGORITHMS:
        raise ConfigError(
            "unknown calibration algorithm",
            code="calibration",
            expected=" or ".join(ALGORITHMS),
            found=str(algorithm),
        )
    if act_order and algorithm != "gptq":
        raise ConfigError("act order belongs to gptq", code="calibration", found=algorithm)
    if isinstance(calibration, (Tensor, Mapping, str)) or not isinstance(calibration, Iterable):
        raise ConfigError(
            "calibration is an iterable of inputs",
            code="calibration",
            expected="each a tensor, a tuple of arguments or a mapping of keyword arguments",
            found=type(calibration).__name__,
            fix="Put a single one into a list.",
        )
    inputs = list(calibration)
    if not inputs:
        raise ConfigError("there are no calibration inputs", code="calibration", found="an empty iterable")
    return inputs


def portions(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in order, in runs whose grams fit into memory together.  sizes: I of each; 0: it needs no gram."""
    runs: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        nbytes = 4 * size * size
        if runs[-1] and filled + nbytes > MOST_BYTES:
            runs.append([])
            filled = 0
        runs[-1].append(name)
        filled += nbytes
    return runs


@torch.no_grad()
def record(
    root: nn.Module, modules: Mapping[str, nn.Module], sizes: Mapping[str, int], inputs: Sequence[Any]
) -> dict[str, InputStatistics]:
    """Run `root` over all inputs and collect what `modules` are called with.

    sizes: I of the modules of which products of inputs are wanted; 0: only the largest magnitude is.
    """
    statistics = {name: InputStatistics(sizes[name], gram=bool(sizes[name])) for name in modules}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            statistics[name].add(args[0] if args else kwargs["input"])

        return hook

    handles = [
        module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, module in modules.items()
    ]
    try:
        with _evaluating(root):
            for each in inputs:
                if isinstance(each, Mapping):
                    root(**each)
                elif isinstance(each, (tuple, list)):
                    root(*each)
                else:
                    root(each)
    finally:
        for handle in handles:
            handle.remove()
    return statistics


@contextlib.contextmanager
def _evaluating(root: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards every module is in the mode it was in."""
    training = [module for module in root.modules() if module.training]
    root.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
