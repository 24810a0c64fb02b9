"""The agreement of ranks before they load: the same model from the same files, decided in the same way.

Ranks that hold shares of different models answer nonsense, and those that cut them differently end in a collective. So
each states what it is about to load, all compare, and whoever cannot load at all tells the others why.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

import pymllm
from pymllm.adapters.config import load_lora_config
from pymllm.errors import ConfigError, RankError, counted, first_few
from pymllm.kernels.hardware import probe_device
from pymllm.loading.prepare import Prepared
from pymllm.parallel import Parallel
from pymllm.weights.tensor_file import TensorFile

# How many tensors of a file are looked into, and how many bytes of each, at its beginning and in its middle: two
# checkpoints of one shape have the same headers.
SAMPLED_TENSORS, SAMPLED_BYTES = 256, 64

# What decides, beside the model, what a rank asks for where every rank has the requests.
OF_REQUESTS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)

Made = TypeVar("Made")


def prepare_alike(
    parallel: Parallel,
    make: Callable[[], Made],
    prepared_of: Callable[[Made], Prepared],
    adapters: Mapping[str, str | Path] | None = None,
) -> Made:
    """Prepare a load on every rank, and have all ranks fail where one does, or where they would load different things.

    make: prepares it.  prepared_of: finds what was prepared in what `make` returns.
    Returns that.  Raises what `make` raises; RankError for another rank's error, or for a difference.
    """
    if parallel.size == 1 or parallel.group is None:
        return make()
    failure: Exception | None = None
    mine: dict[str, Any] = {}
    try:
        made = make()
        mine["facts"] = facts(prepared_of(made), adapters)
    except Exception as error:
        failure, mine["error"] = error, str(error) or type(error).__name__
    everyone = parallel.exchange(mine)
    if failure is not None:
        raise failure
    for rank, said in enumerate(everyone):
        if "error" in said:
            raise RankError(
                f"rank {rank} of {parallel.size} cannot load: {said['error']}", code="rank-failed"
            )
    compare([said["facts"] for said in everyone])
    return made


def compare(everyone: list[dict[str, str]]) -> None:
    """Raise one RankError that names all that differs between ranks, if anything does.

    everyone: what each rank is about to load, by what it is, in rank order.
    """
    names = list(dict.fromkeys(name for facts in everyone for name in facts))
    differences = []
    for name in names:
        found = [facts.get(name, "nothing") for facts in everyone]
        rank = next((rank for rank, one in enumerate(found) if one != found[0]), None)
        if rank is not None:
            differences.append(f"{name}: rank 0 has {found[0]}, and rank {rank} has {found[rank]}")
    if differences:
        head = "the ranks would load different things:"
        raise RankError(
            f"{head} {'; '.join(differences)}",
            code="ranks-disagree",
            expected="the same files, options and versions on all ranks",
            fix="Copy the model to all machines, and start all ranks with the same options.",
            brief=f"{head} {first_few(differences, '; ')}",
        )


def facts(prepared: Prepared, adapters: Mapping[str, str | Path] | None = None) -> dict[str, str]:
    """Return what a rank is about to load, by what it is: values that people can read, digests of what is long."""
    quant, execution, strategy = prepared.quant, prepared.execution, prepared.model.strategy
    found = {
        "pymllm's version": pymllm.__version__,
        "torch's version": torch.__version__,
        "the device": probe_device(execution.device).spec.partition(":")[0],
        "the dtype (--dtype)": str(execution.dtype),
        "--compute": str(execution.compute),
        "the kernels (--kernel)": _listed(execution.kernels),
        "--expert-parallel": str(prepared.parallel.expert_parallel),
        "the definition (--definition)": type(prepared.model).__qualname__,
        "the strategy (--strategy)": _listed([strategy.name, *sorted(strategy.settings.items())]),
        "the rules (--quant)": _listed(quant.rules),
        "the KV cache's rules (--kv-cache)": _listed(quant.kv_rules),
        "the methods of the layers": _digest(_listed(sorted(_methods(prepared)))),
        "the config": _digest(json.dumps(prepared.config.raw, sort_keys=True, default=str)),
    }
    for name, folder in sorted((adapters or {}).items()):
        found[f"the adapter {name}"] = describe_adapter(folder)
    for file in prepared.checkpoint.files:
        found[f"the file {file.path.name}"] = _file(file)
    if not prepared.parallel.led:
        for path in (prepared.checkpoint.path / name for name in OF_REQUESTS):
            if path.is_file():
                found[f"the file {path.name}"] = _digest(path.read_bytes())
    if prepared.draft is not None:
        drafting = facts(prepared.draft)
        found.update({f"{name} of the draft model": value for name, value in drafting.items()})
    return found


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values)) or "none"


def _methods(prepared: Prepared) -> Iterable[str]:
    for decisions in (prepared.quant.decisions, prepared.quant.kv_decisions):
        for name, decision in decisions.items():
            yield f"{name}={decision.method}"


def _digest(data: str | bytes) -> str:
    raw = data.encode(errors="surrogatepass") if isinstance(data, str) else data
    return f"sha256 {hashlib.sha256(raw).hexdigest()[:16]}"


def _file(file: TensorFile) -> str:
    """Describe a file: its size, and a digest of its header and of some bytes of its tensors."""
    tensors = sorted(file.tensors.values(), key=lambda tensor: tensor.start)
    header = [(t.name, t.dtype_name, t.shape, t.start, t.end) for t in tensors]
    found = hashlib.sha256(json.dumps(header).encode())
    step = -(-len(tensors) // SAMPLED_TENSORS) or 1
    with open(file.path, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        for tensor in tensors[::step]:
            for start in (tensor.start, (tensor.start + tensor.end) // 2):
                opened.seek(start)
                found.update(opened.read(min(SAMPLED_BYTES, tensor.end - start)))
    return f"{counted(size, 'byte')}, sha256 {found.hexdigest()[:16]} of its header and samples"


def describe_adapter(folder: str | Path) -> str:
    """Describe an adapter's files: their sizes, and a digest of both ends of each."""
    found = hashlib.sha256()
    for path in sorted(load_lora_config(folder).path.glob("adapter_*")):
        with open(path, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            found.update(f"{path.name} {size} ".encode() + opened.read(1 << 20))
            opened.seek(max(size - (1 << 20), 0))
            found.update(opened.read(1 << 20))
    return f"sha256 {found.hexdigest()[:16]}"


def settings_for_ranks(model: str | Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Write an LLM's model and options so that other ranks can be told, as JSON.

    ConfigError for an option that cannot be written.
    """
    return {
        "model": None if model is None else str(model),
        "options": {name: _plain(name, value) for name, value in options.items()},
    }


def _plain(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Path):
        # A file of rules is told from a rule by this.
        return f"@{value}" if name in ("quant", "kv_cache") else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(name, item) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [_plain(name, item) for item in value]
    raise ConfigError(
        f"the option {name} cannot be told to other ranks",
        code="rank-option",
        expected="text, numbers, lists or mappings",
        found=type(value).__name__,
    )
