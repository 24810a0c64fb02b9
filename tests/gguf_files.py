"""Tiny GGUF models, written by the `gguf` package (llama.cpp's own) from transformers' models.

Types that the package quantises to are its own work; the K types it only decodes, so their blocks are random, with
scales that keep activations near one. Either way its `dequantize` says what the file means. Blocks of the other types
are drawn from golden vectors, which llama.cpp made.
"""

# O out_features, I in_features

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from .checkpoints import random_model, tiny_config
from .conformance.vectors import ROOT, Vector

# Sizes that blocks of 256 divide.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 96, "head_dim": 64}
K_SCALES = {  # type: bytes of its float16 scale, of its float16 minimum; the largest product of scale and code
    "Q2_K": (80, 82, 3 * 15),
    "Q3_K": (108, None, 4 * 32),
    "Q4_K": (0, 2, 15 * 63),
    "Q5_K": (0, 2, 31 * 63),
    "Q6_K": (208, None, 32 * 128),
}
NEWER_TYPES = {"Q2_0": 42}  # than the package
gguf.GGML_QUANT_SIZES.setdefault(NEWER_TYPES["Q2_0"], (64, 18))


def number_of(kind: str) -> int:
    """A type's number, as files have it."""
    return NEWER_TYPES.get(kind) or gguf.GGMLQuantizationType[kind]


def golden_blocks(kind: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Blocks that llama.cpp quantised, [n, bytes], and their values, [n, B]; None for a type that the package makes."""
    path = next(ROOT.glob(f"gguf/golden/gguf-{kind.lower()}-*.safetensors"), None)
    vector = None if path is None else Vector(path)
    if vector is None or "llama.cpp" not in vector.case["made_by"]:
        return None
    values, size = gguf.GGML_QUANT_SIZES[number_of(kind)]
    half = vector.out_features // 2  # the other rows are random bits
    raw, meant = vector.stored["weight"][:half].numpy(), vector.dequantized[:half].numpy()
    return raw.reshape(-1, size), meant.reshape(-1, values)


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """[rows, bytes] of a K type, of values up to about 2 / sqrt(columns)."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
    scale, minimum, largest = K_SCALES[kind]
    for start, factor in ((scale, 1.0), (minimum, 0.4 * largest / 63)):
        if start is not None:
            halves = rng.uniform(1, 2, raw.shape[:2]) * factor * 3 / (largest * columns**0.5)
            raw[..., start : start + 2] = halves.astype(np.float16)[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def encode(weight: np.ndarray, kind: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a weight [O, I] in a type, and the float32 weight that they mean."""
    golden = golden_blocks(kind)
    if golden is not None:
        blocks, values = golden
        drawn = np.random.default_rng(seed).integers(
            0, len(blocks), (len(weight), weight.shape[1] // values.shape[1])
        )
        return blocks[drawn].reshape(len(weight), -1), values[drawn].reshape(weight.shape)
    number = gguf.GGMLQuantizationType[kind]
    if kind in K_SCALES:
        raw = random_blocks(kind, *weight.shape, seed)
    else:
        raw = gguf.quantize(weight.astype(np.float32), number)
    return raw, gguf.dequantize(raw, number).reshape(weight.shape).astype(np.float32)


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's converter stores them for the llama architecture."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def byte_tokens() -> list[str]:
    """96 tokens: printable characters in GPT-2's byte alphabet, two merged ones and a special one."""
    return [*(chr(33 + i) for i in range(92)), "\u0120", "he", "ll", "<|end|>"]


def write_gguf(
    path: Path,
    family: str = "llama",
    kinds: str | Callable[[str], str] = "Q8_0",
    *,
    edit: Callable[[gguf.GGUFWriter], None] | None = None,
    edit_tensors: Callable[[dict[str, tuple[np.ndarray, str]]], None] | None = None,
    tokenizer: bool = True,
    split: int = 0,
    seed: int = 0,
    **settings: Any,
) -> Any:
    """Write a random model of `family`; returns transformers' model in float32 with the weights that the file means.

    kinds: the type of every matrix, or what gives it by GGUF name.  split: tensors of a file of several; 0: one file.
    """
    config = tiny_config(family, **(SIZES | settings))
    model = random_model(config, seed)
    arch = {"mistral": "llama"}.get(family, family)
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    write_settings(writer, config, arch)
    if tokenizer:
        write_byte_tokenizer(writer)
    if edit is not None:
        edit(writer)
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tensors: dict[str, tuple[np.ndarray, str]] = {}
    for index, (name, weight) in enumerate(model.state_dict().items()):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        kind = "F32" if weight.ndim == 1 else kinds if isinstance(kinds, str) else kinds(stored)
        values = weight.numpy().copy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        rotated = heads.get(name.split(".")[-2]) if arch == "llama" else None
        if rotated:
            values = interleave(values, rotated)
        raw, meant = (values, values) if kind == "F32" else encode(values, kind, index)
        tensors[stored] = raw, kind
        if rotated:  # back again, as `interleave` of the other factor
            meant = meant.reshape(rotated, -1, 2, *meant.shape[1:]).swapaxes(1, 2).reshape(meant.shape)
        with torch.no_grad():
            weight.copy_(torch.from_numpy(np.ascontiguousarray(meant)))
    if edit_tensors is not None:
        edit_tensors(tensors)
    for name, (raw, kind) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=number_of(kind))
    finish(writer)
    return model


def finish(writer: gguf.GGUFWriter) -> None:
    """Write all that was added, and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_settings(writer: gguf.GGUFWriter, config: Any, arch: str) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if arch == "llama":
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)


def write_byte_tokenizer(
    writer: gguf.GGUFWriter, pre: str = "gpt-2", merges: Sequence[str] = ("h e", "l l")
) -> None:
    tokens = byte_tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 95 + [3])
    writer.add_token_merges(list(merges))
    writer.add_eos_token_id(95)
