"""`load_model`: a checkpoint's model alone, packed, without an engine around it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pymllm.arguments import checked
from pymllm.loading.load import load_prepared
from pymllm.loading.options import LoadOptions
from pymllm.models.language_model import LanguageModel
from pymllm.parallel import current_parallel
from pymllm.planning.deciding import decide
from pymllm.quantization.rules import RuleSource

if TYPE_CHECKING:
    from typing_extensions import Unpack


@checked()
def load_model(
    path: str | Path | None = None,
    quant: RuleSource = None,
    *,
    progress: bool | None = None,
    check_memory: bool = True,
    packed_cache: str | Path = "off",
    **options: Unpack[LoadOptions],
) -> LanguageModel:
    """Load a checkpoint into a model whose every weight is packed for the best kernel.

    path: a folder of config.json and safetensors files, a .gguf file, or a hub id "org/name"; None: the small
    model that comes with the package.
    quant: rules over the checkpoint's own config, {"**.mlp.**": "fp8"} say, or a list of "PATTERN=METHOD" lines, or
    "@FILE"; None: as stored.
    progress: whether to show a bar while loading; None: on a terminal.
    check_memory: whether to refuse, with numbers, a model that the plan says does not fit into what is free.
    packed_cache: where packed weights are kept, so that the next start is quick: "auto" (docs/starting.md), a folder,
    or "off".
    device: "auto" (a GPU where there is one), "cpu", "cuda" or, of several GPUs, "cuda:1".
    dtype: of what layers pass to each other, "bfloat16" say; "auto": the checkpoint's own, but float32 on a CPU for a
    quantised one.
    compute: "auto" lets kernels round their inputs to fewer bits where that is faster, "exact" forbids it, "checkpoint"
    demands what the checkpoint asks for.
    kernels: the kernel of an operation by name, {"linear": "reference"} say; None: the best that can.
    kv_cache: how keys and values are stored: "fp8", "int8", "none", a dtype's name, or such methods for patterns of
    attention layers; None: as the checkpoint says.
    revision: a branch, tag or commit of a hub id; None: its main branch.
    definition: "auto" runs our page of the model type, or else transformers' class; "transformers" always its class.
    strategy: how answers are decoded, "block_diffusion:block_length=32" say; None: as the model was trained for.

    The current `Parallel` decides this rank's share.  The model carries `load_report` and `prepared`.
    Raises one CheckpointError that lists everything wrong with the checkpoint, before any tensor is read; ConfigError,
    RuleError, ShardingError or KernelError for what cannot be honoured.
    """
    decided = decide(current_parallel(), path, {"quant": quant, **options}, check_memory=check_memory)
    return load_prepared(decided[0], progress=progress, packed_cache=packed_cache)
