"""The GPUs that this process sees: how many there are, and which of them a name, or a rank, means.

They are counted as torch counts them: from 0, after CUDA_VISIBLE_DEVICES has left out or reordered some. torch is
imported when it is first asked, as what starts ranks must not wait for it.
"""

from __future__ import annotations

import os
import re
from typing import Any

from pymllm.errors import ConfigError, counted

NAMED = re.compile(r"cuda:(0|[1-9][0-9]*)")

# What torch was built for: code of an architecture, "sm_90a", or PTX, "compute_120".
BUILT_FOR = re.compile(r"\b(sm|compute)_([0-9]+)([0-9])[a-z]?\b")

# What leaves GPUs out, or reorders them; AMD's driver and runtime have a variable each.
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def named_gpu(device: str) -> int | None:
    """Return the number of the GPU that a device's name ends in, as "cuda:1" does; None: it names no single one."""
    match = NAMED.fullmatch(device)
    return None if match is None else int(match[1])


def count_gpus() -> int:
    """Return how many GPUs torch can use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def describe_gpus() -> str:
    """Say how many GPUs there are, their names, and what has left others out."""
    count = count_gpus()
    visible = ", ".join(f"{name}={os.environ[name]}" for name in VISIBLE if name in os.environ)
    names = {0: "", 1: ", cuda:0"}.get(count, f", cuda:0 to cuda:{count - 1}")
    return f"{counted(count, 'GPU')}{names}" + (f" ({visible})" if visible else "")


def why_torch_cannot(properties: Any) -> str | None:
    """Return why this build of torch runs nothing on a GPU that it sees, an old one mostly, or None.

    properties: as torch tells them.  Code runs on its architecture and later ones of the same major number, PTX on all
    later ones; of AMD's GPUs torch does not say.
    """
    import torch

    built = torch.cuda.get_arch_list() if torch.version.hip is None else []
    targets = [(kind, (int(major), int(minor))) for kind, major, minor in BUILT_FOR.findall(" ".join(built))]
    own = (properties.major, properties.minor)
    if not targets or any(
        target <= own and (kind == "compute" or target[0] == own[0]) for kind, target in targets
    ):
        return None
    return f"this build of torch has no code for capability {own[0]}.{own[1]}, only for {', '.join(built)}"


def local_rank() -> int | None:
    """Return which of its machine's ranks this process is, as torchrun says in LOCAL_RANK; None: nobody has said so.

    ConfigError for a LOCAL_RANK that is no number.
    """
    return _number("LOCAL_RANK", "which rank of this machine this is")


def local_ranks() -> int:
    """Return how many ranks this machine has, as torchrun says in LOCAL_WORLD_SIZE; 1: nobody has said so."""
    return _number("LOCAL_WORLD_SIZE", "how many ranks this machine has") or 1


def _number(variable: str, what: str) -> int | None:
    """Read a number that torchrun sets; None without it."""
    text = os.environ.get(variable, "")
    if not text:
        return None
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(
            f"{variable} does not say {what}",
            code="local-rank",
            expected="an integer of at least 0, as torchrun sets it",
            found=repr(text),
        )
    return int(text)


def own_gpu() -> int:
    """Return the number of the GPU that "cuda" alone means: LOCAL_RANK's, or else the current one of this thread.

    ConfigError where LOCAL_RANK has none.
    """
    import torch

    rank = local_rank()
    if rank is None:
        return torch.cuda.current_device()
    check_local_rank(rank)
    return rank


def check_local_rank(rank: int) -> None:
    """Raise ConfigError where a rank's machine has no GPU for it.  rank: which of its machine's ranks it is."""
    if rank >= count_gpus():
        raise ConfigError(
            f"there are fewer GPUs than ranks: rank {rank} of this machine (LOCAL_RANK) has none",
            code="rank-devices",
            expected=f"at least {counted(rank + 1, 'GPU')}, as rank i runs on GPU i",
            found=describe_gpus(),
            fix="Start fewer ranks, or run on the CPU with --device cpu. Where a rank sees its own GPU alone, its "
            "LOCAL_RANK must be 0 (torchrun --virtual-local-rank).",
        )


def refuse_one_gpu(device: str, ranks: int) -> None:
    """Raise ConfigError where one GPU is named for several ranks of a machine.  ranks: how many it has."""
    if ranks > 1 and named_gpu(device) is not None:
        raise ConfigError(
            f"{device} is one GPU, and this machine has {counted(ranks, 'rank')}",
            code="rank-devices",
            expected="--device cuda, with which rank i of a machine runs on its GPU i",
            found=device,
            fix="Say which GPUs there are with CUDA_VISIBLE_DEVICES=2,3 and the like.",
        )
