"""Tiny Hugging Face checkpoints: random weights, written plain or quantised.

The model and its logits come from transformers. The quantised tensors come from the plain writers below, made from the
words of quantization/awq/README.md and quantization/fp8/README.md, and share no code with the package under test.
"""

# T tokens, V vocabulary, O out_features, I in_features, G group_size

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# A gated delta net, then attention; so many heads that eight outputs of a packed word are a rank's of four.
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 4,
}
# transformers' name of each family, and settings without which a tiny model would not show what is particular to it.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma": ("Gemma", {}),
    "gemma2": (
        "Gemma2",
        {
            "sliding_window": 7,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": (
        "Gemma3Text",
        {"sliding_window": 7, "query_pre_attn_scalar": 24, "sliding_window_pattern": 2},
    ),
    "phi3": ("Phi3", {"pad_token_id": 0}),
    "olmo2": ("Olmo2", {}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.0625,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "glm4": ("Glm4", {"pad_token_id": 0}),
    "qwen3_5_text": ("Qwen3_5Text", HYBRID),
}
# Two layers of four query heads and two key heads; sizes that groups and blocks of 128 divide, but an odd vocabulary.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


class Writer(Protocol):
    """How the linear layers of decoder blocks are stored."""

    def config(self, ignored: tuple[str, ...]) -> dict[str, Any] | None:
        """The `quantization_config` of a checkpoint that leaves the modules named `ignored` alone."""

    def encode(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """weight: [O, I] float.  Returns the tensors by suffix, and the float32 weight that they mean."""


@dataclass(frozen=True)
class Plain:
    """Not quantised."""

    dtype: torch.dtype = torch.float32

    def config(self, ignored: tuple[str, ...]) -> dict[str, Any] | None:
        return None

    def encode(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        stored = weight.to(self.dtype)
        return {"weight": stored}, stored.float()


@dataclass(frozen=True)
class AWQ:
    """int4 in AutoAWQ's GEMM layout.  group_size: -1 is the whole row."""

    group_size: int = 128
    symmetric: bool = False

    def config(self, ignored: tuple[str, ...]) -> dict[str, Any] | None:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group_size,
            "zero_point": not self.symmetric,
            "version": "gemm",
            "modules_to_not_convert": list(ignored) or None,
        }

    def encode(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        out_features, in_features = weight.shape
        size = in_features if self.group_size == -1 else self.group_size
        assert in_features % size == 0
        groups = weight.double().reshape(out_features, in_features // size, size)  # [O, I/G, G]
        if self.symmetric:
            scales = (groups.abs().amax(-1) / 7).half()
            zeros = torch.full_like(scales, 8, dtype=torch.int64)
        else:
            low, high = groups.amin(-1), groups.amax(-1)
            scales = ((high - low) / 15).half()
            zeros = (-low / scales.double()).round().clamp(0, 15).long()
        codes = (groups / scales.double()[..., None]).round().long() + zeros[..., None]
        codes = codes.clamp(0, 15)
        meant = (codes - zeros[..., None]) * scales.double()[..., None]
        tensors = {
            "qweight": pack_awq(codes.reshape(out_features, in_features).t()),  # [I, O/8]
            "qzeros": pack_awq(zeros.t()),  # [I/G, O/8]
            "scales": scales.t().contiguous(),  # [I/G, O]
        }
        return tensors, meant.reshape(out_features, in_features).float()


def pack_awq(codes: Tensor) -> Tensor:
    """[N, O] codes 0..15 to [N, O/8] signed words: nibble i holds column (0, 2, 4, 6, 1, 3, 5, 7)[i] of its eight."""
    words = torch.zeros((codes.shape[0], codes.shape[1] // 8), dtype=torch.int64)
    for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words += codes[:, column::8] * 16**nibble
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@dataclass(frozen=True)
class FP8:
    """e4m3 in the spelling of `quant_method: fp8`.

    block: (outputs, inputs) of a scale; None: one scale.  static: an input_scale beside every weight.
    """

    block: tuple[int, int] | None = (128, 128)
    static: bool = False

    def config(self, ignored: tuple[str, ...]) -> dict[str, Any] | None:
        return {
            "quant_method": "fp8",
            "activation_scheme": "static" if self.static else "dynamic",
            "weight_block_size": list(self.block) if self.block else None,
            "modules_to_not_convert": list(ignored) or None,
        }

    def encode(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        out_features, in_features = weight.shape
        stored, scales, meant = encode_e4m3(weight, self.block or (out_features, in_features))
        name = "weight_scale_inv" if self.block else "weight_scale"
        tensors = {"weight": stored, name: scales if self.block else scales.reshape(())}
        if self.static:
            tensors["input_scale"] = torch.tensor(0.05)
        return tensors, meant


@dataclass(frozen=True)
class CompressedFP8:
    """e4m3 as compressed-tensors spells it (format float-quantized), scales in `dtype`.

    strategy: tensor, channel or block.  static: an input_scale beside every weight.
    """

    strategy: str = "channel"
    static: bool = False
    block: tuple[int, int] = (128, 128)
    dtype: torch.dtype = torch.bfloat16

    def config(self, ignored: tuple[str, ...]) -> dict[str, Any] | None:
        kind = {"type": "float", "num_bits": 8, "symmetric": True}
        weights = kind | {"strategy": self.strategy, "dynamic": False}
        if self.strategy == "block":
            weights["block_structure"] = list(self.block)
        inputs = kind | {"strategy": "tensor" if self.static else "token", "dynamic": not self.static}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group | {"format": "float-quantized"}},
            "ignore": ["lm_head", *ignored],
        }

    def encode(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        out_features, in_features = weight.shape
        block = {"tensor": (out_features, in_features), "channel": (1, in_features)}.get(
            self.strategy, self.block
        )
        stored, scales, meant = encode_e4m3(weight, block, self.dtype)
        tensors = {
            "weight": stored,
            "weight_scale": scales.reshape(1) if self.strategy == "tensor" else scales,
        }
        if self.static:
            tensors["input_scale"] = torch.tensor([0.05], dtype=self.dtype)
        return tensors, meant


def encode_e4m3(
    weight: Tensor, block: tuple[int, int], scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """[O, I] floats to e4m3, their grid of scales [⌈O/B0⌉, ⌈I/B1⌉], and the float32 weight that these mean."""
    (out_features, in_features), (height, width) = weight.shape, block
    rows, columns = torch.arange(out_features) // height, torch.arange(in_features) // width
    scales = torch.zeros(int(rows[-1]) + 1, int(columns[-1]) + 1, dtype=scale_dtype)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            tile = weight[row * height : (row + 1) * height, column * width : (column + 1) * width]
            scales[row, column] = tile.abs().max() / 448
    spread = scales.double()[rows][:, columns]  # [O, I]
    stored = (weight.double() / spread).clamp(-448, 448).float().to(torch.float8_e4m3fn)
    return stored, scales, (stored.double() * spread).float()


FORMATS: dict[str, Writer] = {
    "none": Plain(),
    "none-bf16": Plain(torch.bfloat16),
    "awq-g32": AWQ(32),
    "awq-g64": AWQ(64),
    "awq-g128": AWQ(128),
    "awq-row": AWQ(-1),
    "awq-g64-sym": AWQ(64, symmetric=True),
    "fp8-block": FP8(),
    "fp8-block-64x32": FP8((64, 32)),
    "fp8-block-static": FP8(static=True),
    "fp8-tensor": FP8(None),
    "fp8-tensor-static": FP8(None, static=True),
    "ct-block": CompressedFP8("block"),
    "ct-channel": CompressedFP8("channel"),
    "ct-channel-f32": CompressedFP8("channel", dtype=torch.float32),
    "ct-tensor": CompressedFP8("tensor"),
    "ct-tensor-static": CompressedFP8("tensor", static=True),
}


@dataclass(frozen=True)
class TinyCheckpoint:
    """folder: the checkpoint.  model: transformers' own, in float32, with the weights that the folder means."""

    folder: Path
    model: Any
    linears: tuple[str, ...] = field(repr=False)  # the names of the quantised layers

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Everything stored, by name."""
        return load_tensors(self.folder)

    @cached_property
    def ids(self) -> Tensor:
        """[24] random token ids."""
        vocab = self.model.config.vocab_size
        return torch.randint(0, vocab, (24,), generator=torch.Generator().manual_seed(3))

    def logits(self, ids: Tensor | None = None) -> Tensor:
        """[T, V] float32, from transformers.  ids: [T]."""
        with torch.no_grad():
            return self.model((self.ids if ids is None else ids).unsqueeze(0), use_cache=False).logits[0]


def tiny_config(
    family: str = "llama", families: Mapping[str, tuple[str, dict[str, Any]]] = FAMILIES, **settings: Any
) -> Any:
    """Make transformers' config of a tiny model of this family; `settings` over SIZES."""
    import transformers

    name, particular = families[family]
    cls = getattr(transformers, f"{name}Config")
    # Eager attention is the plain formula, and takes every mask.
    return cls(**(SIZES | particular | settings), attn_implementation="eager")


def random_model(config: Any, seed: int = 0) -> Any:
    """A float32 model whose weights keep activations near one, so that logits tell models apart."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if param.ndim == 1:
                param.copy_(1 + 0.1 * noise if "norm" in name else 0.3 * noise)
            else:
                param.copy_(noise * (1.0 if "embed" in name else param.shape[1] ** -0.5))
    return model


def write_checkpoint(
    folder: Path,
    family: str = "llama",
    fmt: str | Writer = "none",
    *,
    parts: Mapping[str, str | Writer] | None = None,
    ignored: tuple[str, ...] = (),
    shards: int = 1,
    seed: int = 0,
    edit_config: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> TinyCheckpoint:
    """Make `folder` with a random model of `family` in it, its decoder's linear layers stored in `fmt`.

    parts: other writers for layers whose name ends so.  ignored: the names or endings of layers left unquantised.
    shards: more than one writes an index.  edit_config: changes config.json's values before they are written.
    settings: of the family's config class.
    """
    config = tiny_config(family, **settings)
    model = random_model(config, seed)
    writer = FORMATS[fmt] if isinstance(fmt, str) else fmt
    plain = writer if isinstance(writer, Plain) else Plain()
    tensors, linears = {}, []
    for name, weight in list(model.state_dict().items()):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        layer, _, suffix = name.rpartition(".")
        chosen = plain
        if (
            ".layers." in name
            and suffix == "weight"
            and weight.ndim == 2
            and not layer.endswith(ignored or "\0")
        ):
            chosen = next((w for end, w in (parts or {}).items() if layer.endswith(end)), writer)
            chosen = FORMATS[chosen] if isinstance(chosen, str) else chosen
            linears.append(layer)
        stored, meant = chosen.encode(weight)
        with torch.no_grad():
            weight.copy_(meant)
        # The others have no layer's suffix of their own: "weight" of a norm, "bias".
        tensors |= {f"{layer}.{suffix if key == 'weight' else key}": value for key, value in stored.items()}
    save_config(folder, model, plain.dtype, writer.config(ignored), edit_config)
    save_tensors(folder, tensors, shards)
    return TinyCheckpoint(folder, model, tuple(linears))


def save_config(
    folder: Path,
    model: Any,
    dtype: torch.dtype,
    quantization: dict[str, Any] | None,
    edit: Callable[[dict[str, Any]], None] | None,
) -> None:
    """Make `folder` with the config.json of transformers' model in it.

    edit: changes the values before they are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    raw = json.loads(model.config.to_json_string())
    raw["dtype"] = str(dtype).removeprefix("torch.")
    raw["architectures"] = [type(model).__name__]
    if quantization is not None:
        raw["quantization_config"] = quantization
    if edit is not None:
        edit(raw)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))


def save_tensors(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> None:
    """Write model.safetensors, or that many shards and their index; what was there before is removed."""
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
        return
    names = list(contiguous)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: contiguous[name] for name in mine}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    size = sum(tensor.nbytes for tensor in contiguous.values())
    write_index(folder, weight_map, size)


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int = 0) -> None:
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Everything in the folder's safetensors files, by the safetensors library."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; `quantization_config` is merged."""
    raw = json.loads((folder / "config.json").read_text())
    changed = copy.deepcopy(changes)
    if isinstance(changed.get("quantization_config"), dict):
        changed["quantization_config"] = raw.get("quantization_config", {}) | changed["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw | changed))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest magnitude that was expected."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
