"""Tensors of a checkpoint that transformers' class does not need: those it leaves out by name, and computed buffers."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import Tensor

from pymllm.weights.report import Skip

COMPUTED = "values that follow from the config"


def skip_reason(model: Any, tensor: str, wrapped: bool) -> Skip | str | None:
    """Return why a class does not need a tensor, and the proof where there is one; None: it may not be skipped.

    model: transformers'.  wrapped: whether it is the text model of a wrapper, which knows the names of all other parts.
    The patterns of what a class leaves out are meant for checkpoints of certain sizes, and may fit a layer that runs:
    within numbered layers, and beside a wrapper, one counts only for the very name that it spells.
    """
    module, _, name = tensor.rpartition(".")
    try:
        computed = model.get_submodule(module)._buffers.get(name)
    except AttributeError:
        computed = None
    if computed is not None:
        return Skip(COMPUTED, functools.partial(_refuse_other, known=[computed]))
    frequencies = [buffer for path, buffer in model.named_buffers() if path.rpartition(".")[2] == "inv_freq"]
    if name == "inv_freq" and frequencies:
        return Skip(COMPUTED, functools.partial(_refuse_other, known=frequencies))
    for pattern in model._keys_to_ignore_on_load_unexpected or ():
        if re.search(pattern, tensor) and (_spells(pattern, tensor) or not (wrapped or _in_layer(tensor))):
            return f"transformers' class leaves out what is called {pattern}"
    return None


def _in_layer(tensor: str) -> bool:
    """Tell whether a name is of a tensor in one of several modules that are counted."""
    return any(word.isdigit() for word in tensor.split("."))


def _spells(pattern: str, tensor: str) -> bool:
    """Tell whether a pattern ends in words, and the tensor's name in the same ones."""
    words = pattern.rstrip("$").replace(r"\.", ".").split(".")
    plain: list[str] = []
    for word in reversed(words):
        if not re.fullmatch(r"\w+", word):
            break
        plain.insert(0, word)
    return bool(plain) and tensor.split(".")[-len(plain) :] == plain


def _refuse_other(found: Tensor, known: list[Tensor]) -> str | None:
    """Return why stored values are none of those that the model computes, or None.

    They may have been rounded to the weights' dtype, of which bfloat16 has 8 bits.
    """
    alike = [values for values in known if values.shape == found.shape]
    if not alike:
        return f"values of the shape {list(found.shape)}, where the config gives {list(known[0].shape)}"
    same = (torch.allclose(found.float(), one.float().cpu(), rtol=2**-7, atol=1e-6) for one in alike)
    return None if any(same) else "other values than the config gives"
