"""The arguments that say how a checkpoint is loaded: the same for `plan`, `load_model`, `verify` and `compare`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import torch

from pymllm.quantization.rules import RuleSource


class LoadOptions(TypedDict, total=False):
    """The options of loading, beside a checkpoint's path and the rules for its weights.

    device: "auto" (a GPU where there is one), "cpu", "cuda" or, of several GPUs, "cuda:1"; to plan for another
    machine, "cuda:sm90" say.
    dtype: of what layers pass to each other, "bfloat16" say; "auto": the checkpoint's own, but float32 on a CPU for a
    quantised one.
    compute: "auto" lets kernels round their inputs to fewer bits where that is faster (the plan says which do), "exact"
    forbids it, "checkpoint" demands just what the checkpoint asks for.
    kernels: the kernel of an operation by name, {"linear": "reference"} say; None: the best that can.
    kv_cache: how keys and values are stored: "fp8", "int8", "none" (floats, of the checkpoint's 16 bits unless float32
    was asked for, by `dtype` or by `compute` "exact"), a dtype's name, or such methods for patterns of attention
    layers, as in rules for weights; None or "auto": as the checkpoint says.
    revision: a branch, tag or commit of a hub id; None: its main branch.
    definition: "auto" runs the page of the model type (pymllm/models), and transformers' class where there is none;
    "transformers" runs its class in any case.
    strategy: how answers are decoded, "autoregressive" or "block_diffusion:block_length=32" say (docs/decoding.md);
    None: as the model was trained for.
    """

    device: str
    dtype: str | torch.dtype
    compute: str
    kernels: Mapping[str, str] | None
    kv_cache: RuleSource
    revision: str | None
    definition: str
    strategy: str | None
