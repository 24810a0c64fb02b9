"""A GGUF model as a checkpoint: its tensors under the names of Hugging Face's models, its metadata as a config.

What the file's writer changed is undone here, so that formats, models and sharding need not know of it: the rows of q
and k of the llama architecture, which are stored with the halves of each head interleaved, are read in their own order.
A model in several files (NAME-00001-of-0000N.gguf) is opened by its first.
"""

# D head size

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pymllm.errors import CheckpointError, first_few, nearest
from pymllm.weights.checkpoint import Checkpoint, merge_tensors
from pymllm.weights.gguf_file import GGUFFile
from pymllm.weights.tensor_file import TensorInfo

# The part of a tensor's name before ".weight" or ".bias" -> its module's name in the model.
MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class GGUFArchitecture:
    """A model definition's word on its GGUF files.

    model_type: Hugging Face's.  layer_modules: what stands after "blk.N.", and the module within a layer that it is.
    interleaved: whether q and k are stored in the other rotary order.
    """

    model_type: str
    layer_modules: Mapping[str, str] = field(default_factory=lambda: LAYER_MODULES)
    interleaved: bool = False


FREQUENCY_FACTORS = "rope_freqs.weight"

# Keys after "ARCHITECTURE." -> config.json's keys; the values are the same.
SETTINGS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
# Further keys that are known: read below, or without an effect on what the model computes.
OTHER_SETTINGS = {"vocab_size", "attention.value_length", "rope.dimension_count", "tensor_data_layout"}
OTHER_SETTINGS |= {"expert_used_count", "rope.scale_linear", "n_ctx", "ctx_length"}
TOKENS = {"bos_token_id": "bos_token_id", "padding_token_id": "pad_token_id"}
END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")

QUANTISED = torch.uint8  # the dtype that blocks are read as
SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def open_gguf(path: Path, architectures: Mapping[str, GGUFArchitecture]) -> Checkpoint:
    """Read the headers of all files of a GGUF model.

    architectures: what model definitions say of their files, by `general.architecture`.
    Raises CheckpointError; its code for a file: see `GGUFFile.open`; for the model it is one of: shards-missing,
    split-part, split-disagrees, duplicate-tensor, config-key, config-value, architecture, shape, bad-content.
    """
    files = _open_parts(path)
    metadata = files[0].metadata
    name = metadata.get("general.architecture")
    architecture = architectures.get(name) if isinstance(name, str) else None
    if architecture is None:
        raise CheckpointError(
            f"GGUF files of the architecture {reprlib.repr(name)} cannot be read",
            code="architecture",
            file=str(path),
            expected=" or ".join(sorted(architectures)) or "a file that is opened with a model definition",
            found=reprlib.repr(name),
            fix=nearest(str(name), architectures),
        )
    stored = merge_tensors(files)
    reader = _ConfigReader(path, metadata, str(name), architecture)
    config = reader.read(stored)
    head_dim = config.get("head_dim") if architecture.interleaved else None
    tensors = {}
    for info in stored.values():
        name = _model_name(info.name, architecture)
        renamed: TensorInfo = replace(info, name=name)
        rotated = name.rpartition(".")[0].endswith(("self_attn.q_proj", "self_attn.k_proj"))
        if rotated and head_dim is not None and info.shape and info.shape[0] % head_dim == 0:
            renamed = InterleavedHeads(**vars(renamed), head_dim=head_dim)
        if name in tensors:
            raise CheckpointError(
                f"two tensors of the file are the model's {name!r}",
                code="duplicate-tensor",
                file=str(path),
                tensor=info.name,
                fix="The file is badly written: convert or download it again.",
            )
        tensors[name] = renamed
    types = {
        name.removesuffix(".weight"): info.dtype_name
        for name, info in tensors.items()
        if info.torch_dtype is QUANTISED
    }
    if types:
        config["quantization_config"] = {"quant_method": "gguf", "types": types}
    return Checkpoint(path, config, files, tensors=tensors, metadata=metadata)


def _model_name(stored: str, architecture: GGUFArchitecture) -> str:
    """Return a tensor's name in the model; its own where the model has none for it, so that matching reports it."""
    module, _, suffix = stored.rpartition(".")
    if module in MODULES:
        return f"{MODULES[module]}.{suffix}"
    layer = re.fullmatch(r"blk\.(0|[1-9]\d*)\.(\w+)", module)
    if layer is not None and layer[2] in architecture.layer_modules:
        return f"model.layers.{layer[1]}.{architecture.layer_modules[layer[2]]}.{suffix}"
    if layer is not None and layer[2] == "attn_rot_embd":
        return f"model.layers.{layer[1]}.self_attn.rotary_emb.inv_freq"
    return stored


@dataclass(frozen=True)
class InterleavedHeads(TensorInfo):
    """A tensor whose rows are stored head by head as 0, D/2, 1, D/2 + 1, ...; `read` gives them in order."""

    head_dim: int

    def read(self, index: tuple[slice, ...] | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        rows, *rest = self._bounds(index)
        first = rows[0] // self.head_dim * self.head_dim
        last = -(-rows[1] // self.head_dim) * self.head_dim
        heads = super().read((slice(first, last), *(slice(*bound) for bound in rest)))
        heads = heads.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        wanted = heads[rows[0] - first : rows[1] - first]
        return wanted.contiguous() if out is None else out.copy_(wanted)


def _open_parts(path: Path) -> list[GGUFFile]:
    """Open the file, or all files of a model that is split over several."""
    first = GGUFFile.open(path)
    count, number = (first.metadata.get(f"split.{name}", 0) for name in ("count", "no"))
    if type(count) is not int or type(number) is not int or count <= 1:
        return [first]
    name = SPLIT_NAME.fullmatch(path.name)
    if name is None or int(name["count"]) != count or int(name["index"]) != number + 1:
        raise CheckpointError(
            f"the file says that it is part {number + 1} of {count} of its model, but does not have that part's name",
            code="split-part",
            file=str(path),
            expected=f"NAME-{number + 1:05d}-of-{count:05d}.gguf",
            fix="Give the model's files the names that they were made with.",
        )
    paths = [path.with_name(f"{name['stem']}-{i + 1:05d}-of-{count:05d}{path.suffix}") for i in range(count)]
    missing = [other.name for other in paths if not other.exists()]
    if missing:
        head = f"{len(missing)} of {count} files of the model are missing:"
        raise CheckpointError(
            f"{head} {', '.join(missing)}",
            code="shards-missing",
            file=str(path),
            fix="Download the missing files.",
            brief=f"{head} {first_few(missing)}",
        )
    if number != 0:
        raise CheckpointError(
            "this is not the first file of its model",
            code="split-part",
            file=str(path),
            fix=f"Pass {paths[0]}, which has the model's settings.",
        )
    files = [first, *(GGUFFile.open(other) for other in paths[1:])]
    for index, file in enumerate(files):
        if (file.metadata.get("split.count"), file.metadata.get("split.no")) != (count, index):
            raise CheckpointError(
                "the file is not the part of the model that its name says",
                code="split-disagrees",
                file=str(file.path),
                expected=f"part {index} of {count}",
                found=f"part {file.metadata.get('split.no')} of {file.metadata.get('split.count')}",
                fix="The files are of different models: download them again.",
            )
    total, announced = sum(len(file.tensors) for file in files), first.metadata.get("split.tensors.count")
    if announced is not None and announced != total:
        raise CheckpointError(
            "the files of the model do not hold as many tensors as the first one announces",
            code="split-disagrees",
            file=str(path),
            expected=f"{announced} tensors",
            found=str(total),
            fix="The files are of different models: download them again.",
        )
    return files


@dataclass(frozen=True)
class _ConfigReader:
    """A reader that turns a GGUF file's metadata into the settings of a config.json."""

    path: Path
    metadata: Mapping[str, Any]
    architecture: str
    known: GGUFArchitecture

    def read(self, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
        """Return the config.  tensors: by their names in the file; some settings only show in them."""
        config: dict[str, Any] = {"model_type": self.known.model_type}
        for key, name in SETTINGS.items():
            value = self._get(key)
            if value is not None:
                config[name] = self._same_for_all_layers(key, value)
        self._refuse_unknown()
        self._check_heads(config)
        table = tensors.get("token_embd.weight")
        if table is not None and table.shape:
            config["vocab_size"] = table.shape[0]
        config["tie_word_embeddings"] = "output.weight" not in tensors
        if self.architecture == "llama":
            config["attention_bias"] = "blk.0.attn_q.bias" in tensors
            config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
        if config.get("sliding_window"):
            config["use_sliding_window"] = True
            config["max_window_layers"] = 0
            if self.architecture == "llama":
                config["model_type"] = "mistral"
        config["rope_parameters"] = self._rope(config, tensors)
        config.pop("rope_theta", None)
        for key, name in TOKENS.items():
            token = self.metadata.get(f"tokenizer.ggml.{key}")
            if token is not None:
                config[name] = token
        ends = [self.metadata.get(f"tokenizer.ggml.{key}") for key in END_TOKENS]
        config["eos_token_id"] = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
        floats = {info.dtype_name for info in tensors.values() if len(info.shape) > 1}
        plain = {"F16": "float16", "F32": "float32"}
        config["dtype"] = plain.get(next(iter(floats)), "bfloat16") if len(floats) == 1 else "bfloat16"
        return config

    def _get(self, key: str) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}")
        # Writers round settings to float32: read 1e-5, which they mean, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def _bad(
        self, key: str, expected: str, code: str = "config-value", fix: str | None = None
    ) -> CheckpointError:
        return CheckpointError(
            "the metadata has a setting that pymllm cannot honour for this architecture",
            code=code,
            file=str(self.path),
            tensor=f"{self.architecture}.{key}",
            expected=expected,
            found=reprlib.repr(self._get(key)),
            fix=fix,
        )

    def _same_for_all_layers(self, key: str, value: Any) -> Any:
        """Reduce a setting that is given for each layer to one value.  CheckpointError where the layers differ."""
        if isinstance(value, np.ndarray):
            if value.size == 0 or not (value == value[0]).all():
                raise self._bad(key, "the same value for all layers")
            return value[0].item()
        return value

    def _refuse_unknown(self) -> None:
        """Raise CheckpointError "config-key" for an unknown setting: it may change what the model computes."""
        for name, value in self.metadata.items():
            key = name.removeprefix(f"{self.architecture}.")
            known = key in SETTINGS or key in OTHER_SETTINGS or key.startswith("rope.scaling.")
            if key == name or known or (key == "attention.causal" and value is True):
                continue
            if isinstance(value, (int, float, str)) and not value and key != "attention.causal":
                continue  # zero, false and "" ask for nothing
            known_keys = ", ".join([*SETTINGS, *sorted(OTHER_SETTINGS)])
            raise self._bad(key, f"only settings out of {known_keys}", "config-key")

    def _check_heads(self, config: dict[str, Any]) -> None:
        heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
        if "head_dim" not in config and type(heads) is int and type(hidden) is int and heads > 0:
            config["head_dim"] = hidden // heads
        head_dim = config.get("head_dim")
        if type(head_dim) is not int or head_dim < 1:
            raise self._bad("attention.key_length", "a positive integer")
        if self._get("attention.value_length") not in (None, head_dim):
            raise self._bad("attention.value_length", f"{head_dim}, as for keys")
        if self.known.interleaved and head_dim % 2:
            raise self._bad("attention.key_length", "an even number")

    def _rope(self, config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
        """Return `rope_parameters`, whichever way the file spells them."""
        head_dim = config["head_dim"]
        rope: dict[str, Any] = {"rope_type": "default"}
        if "rope_theta" in config:
            rope["rope_theta"] = config["rope_theta"]
        rotated = self._get("rope.dimension_count")
        if rotated not in (None, head_dim):
            if type(rotated) is not int or not 0 < rotated < head_dim or self.known.interleaved:
                raise self._bad("rope.dimension_count", str(head_dim))
            rope["partial_rotary_factor"] = rotated / head_dim
        kind = self._get("rope.scaling.type")
        factor = self._get("rope.scaling.factor") or self._get("rope.scale_linear")
        if kind in (None, "none", "linear") and (kind == "none" or factor in (None, 0, 1)):
            pass
        elif kind in (None, "linear"):
            rope |= {"rope_type": "linear", "factor": factor}
        elif kind == "yarn":
            rope |= {"rope_type": "yarn", "factor": factor}
            trained = self._get("rope.scaling.original_context_length")
            named = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
            if trained:
                rope["original_max_position_embeddings"] = trained
            for key, name in named.items():
                if self._get(f"rope.scaling.{key}"):
                    rope[name] = self._get(f"rope.scaling.{key}")
            for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
                if self._get(f"rope.scaling.{key}") not in (None, 1.0):
                    raise self._bad(f"rope.scaling.{key}", "1")
            if self._get("rope.scaling.yarn_log_multiplier"):
                raise self._bad("rope.scaling.yarn_log_multiplier", "0")
        else:
            raise self._bad("rope.scaling.type", "none or linear or yarn")
        factors = tensors.get(FREQUENCY_FACTORS)
        if factors is not None:
            if rope["rope_type"] != "default":
                raise self._bad("rope.scaling.type", f"none, as the file has {FREQUENCY_FACTORS}")
            count = (rotated or head_dim) // 2
            if factors.torch_dtype is not torch.float32 or factors.shape != (count,):
                raise CheckpointError(
                    "the rotary frequency factors do not fit the heads",
                    code="shape",
                    file=str(self.path),
                    tensor=FREQUENCY_FACTORS,
                    expected=f"F32 [{count}], one for each rotated pair of a head",
                    found=f"{factors.dtype_name} {list(factors.shape)}",
                )
            values = factors.read()
            if not bool((values.isfinite() & (values > 0)).all()):
                raise CheckpointError(
                    "a rotary frequency factor is not a positive number",
                    code="bad-content",
                    file=str(self.path),
                    tensor=FREQUENCY_FACTORS,
                    fix="The file is damaged or badly written: download it or convert it again.",
                )
            rope |= {"rope_type": "factors", "factors": values.tolist()}
        return rope
