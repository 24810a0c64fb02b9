"""Runs of a torch module on example inputs, and the statistics of what reaches its weights."""

# I in_features

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.errors import ConfigError, choices, nearest
from pymllm.quantization.rounding.calibrated import InputStatistics

ALGORITHMS = ("gptq", "clip")
MOST_BYTES = 2 << 30  # of statistics at a time; other layers wait for another run over the inputs


def read_calibration(calibration: Iterable[Any], algorithm: str, act_order: bool) -> list[Any]:
    """List the example inputs, so that they can be run several times.

    ConfigError if there are none, if they are no iterable of inputs, or if the algorithm is unknown.
    """
    if algorithm not in ALGORITHMS:
        raise ConfigError(
            "the calibration algorithm is unknown",
            code="calibration",
            expected=choices(ALGORITHMS),
            found=str(algorithm),
            fix=nearest(str(algorithm), ALGORITHMS),
        )
    if act_order and algorithm != "gptq":
        raise ConfigError(
            "act_order belongs to the algorithm gptq", code="calibration", expected="gptq", found=algorithm
        )
    if isinstance(calibration, (Tensor, Mapping, str)) or not isinstance(calibration, Iterable):
        raise ConfigError(
            "calibration must be an iterable of inputs",
            code="calibration",
            expected="each a tensor, a tuple of arguments or a mapping of keyword arguments",
            found=type(calibration).__name__,
            fix="Put a single input into a list.",
        )
    inputs = list(calibration)
    if not inputs:
        raise ConfigError(
            "there are no calibration inputs",
            code="calibration",
            expected="one input or more",
            found="an empty iterable",
        )
    return inputs


def portions(sizes: Mapping[str, int]) -> list[list[str]]:
    """Divide names, in order, into runs whose grams fit into memory together.  sizes: I of each; 0: it has no gram."""
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


@dataclass(frozen=True)
class Tap:
    """A place in a module where inputs of weights are seen.

    read: of the arguments of a call of `module`, finds the inputs [*, I] of each weight that `wanted` names.
    """

    module: nn.Module
    read: Callable[[tuple[Any, ...], Mapping[str, Any], Container[str]], Iterable[tuple[str, Tensor]]]


@torch.no_grad()
def record(
    root: nn.Module, taps: Sequence[Tap], sizes: Mapping[str, int], inputs: Sequence[Any]
) -> dict[str, InputStatistics]:
    """Run `root` on all inputs, and collect statistics of what reaches the weights that `sizes` names.

    sizes: I of each weight whose gram (the products of its inputs) is wanted; 0: only the largest magnitude is wanted.
    """
    statistics = {name: InputStatistics(size, gram=bool(size)) for name, size in sizes.items()}

    def keep(tap: Tap) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for name, rows in tap.read(args, kwargs, statistics):
                statistics[name].add(rows)

        return hook

    handles = [tap.module.register_forward_pre_hook(keep(tap), with_kwargs=True) for tap in taps]
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
    """Run without dropout; afterwards every module is in the mode that it was in."""
    training = [module for module in root.modules() if module.training]
    root.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
