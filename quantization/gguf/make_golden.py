"""Make the GGUF golden vectors with llama.cpp's own Python package, and with llama.cpp itself.

    pip install gguf==0.19.0 xllamacpp==2026.10.11549 torch safetensors
    python -m quantization.gguf.make_golden

The package quantises to the types of 32 values; the K types it only decodes, so theirs are random blocks (every bit of
codes and small scales) with float16 scales of ordinary size. `dequantized` is its `dequantize` of either.

The other types are the work of llama.cpp (`llama_cpp.py`): half of their rows are what it quantises, the others have
random bits everywhere but in the scales of blocks. `dequantized` is its; the package agrees where it knows the type.

Legend: I in_features, O out_features.
"""

import gguf
import numpy as np
import torch

from quantization.gguf import llama_cpp
from quantization.golden_writer import sizes, write_vector

WRITER = "gguf 0.19.0"
# name, bytes of the block where float16 numbers begin (K types)
CASES = (
    ("gguf-q4_0-i96-o24", None),
    ("gguf-q4_1-i96-o24", None),
    ("gguf-q5_0-i96-o24", None),
    ("gguf-q5_1-i96-o24", None),
    ("gguf-q8_0-i96-o24", None),
    ("gguf-q2_k-i512-o12", (80, 82)),
    ("gguf-q3_k-i512-o12", (108,)),
    ("gguf-q4_k-i512-o12", (0, 2)),
    ("gguf-q5_k-i512-o12", (0, 2)),
    ("gguf-q6_k-i512-o12", (208,)),
)
# name, and the bits of a block that hold its scale: (byte, mask)
LLAMA_CPP_CASES = (
    ("gguf-iq1_s-i512-o16", ((0, 255), (1, 255))),
    ("gguf-iq1_m-i512-o16", ((49, 240), (51, 240), (53, 240), (55, 240))),
    ("gguf-iq2_xxs-i512-o16", ((0, 255), (1, 255))),
    ("gguf-iq2_xs-i512-o16", ((0, 255), (1, 255))),
    ("gguf-iq2_s-i512-o16", ((0, 255), (1, 255))),
    ("gguf-iq3_xxs-i512-o16", ((0, 255), (1, 255))),
    ("gguf-iq3_s-i512-o16", ((0, 255), (1, 255))),
    ("gguf-iq4_nl-i96-o16", ((0, 255), (1, 255))),
    ("gguf-iq4_xs-i512-o16", ((0, 255), (1, 255))),
    ("gguf-tq1_0-i512-o16", ((52, 255), (53, 255))),
    ("gguf-tq2_0-i512-o16", ((64, 255), (65, 255))),
    ("gguf-mxfp4-i96-o16", ((0, 255),)),
    ("gguf-nvfp4-i192-o16", ((0, 255), (1, 255), (2, 255), (3, 255))),
    ("gguf-q1_0-i256-o16", ((0, 255), (1, 255))),
    ("gguf-q2_0-i192-o16", ((0, 255), (1, 255))),
)


def random_blocks(
    rng: np.random.Generator, rows: int, blocks: int, size: int, halves: tuple[int, ...]
) -> np.ndarray:
    """Make [rows, blocks * size] random bytes, with a small float16 number at the bytes `halves` of each block."""
    raw = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for start in halves:
        values = rng.standard_normal((rows, blocks)) * 2e-4  # of both signs; some are subnormal in float16
        raw[..., start : start + 2] = values.astype(np.float16)[..., None].view(np.uint8)
    return raw.reshape(rows, blocks * size)


def half_random(
    rng: np.random.Generator, raw: np.ndarray, size: int, scale: tuple[tuple[int, int], ...]
) -> None:
    """Randomise the lower half of the rows [O, bytes] in place, but for the bits that hold a block's scale."""
    rows = raw[raw.shape[0] // 2 :].reshape(-1, size)
    keep = np.zeros(size, np.uint8)
    for byte, mask in scale:
        keep[byte] = mask
    rows[:] = rows & keep | rng.integers(0, 256, rows.shape, dtype=np.uint8) & ~keep


def make_by_llama_cpp() -> None:
    for seed, (name, scale) in enumerate(LLAMA_CPP_CASES, start=len(CASES)):
        kind = name.split("-")[1].upper()
        out_features, in_features = sizes(name)
        rng = np.random.default_rng(seed)
        weight = (rng.standard_normal((out_features, in_features)) * 0.05).astype(np.float32)
        values, size = llama_cpp.block_sizes(kind)
        weight[0, :values] = 0
        importance = (rng.random(in_features) + 0.1).astype(np.float32)
        raw = llama_cpp.quantize(weight, kind, importance)
        half_random(rng, raw, size, scale)
        dequantized = llama_cpp.dequantize(raw, kind)
        number = getattr(gguf.GGMLQuantizationType, kind, None)
        if number is not None and kind != "Q1_0":  # which it has a number for, but no code
            assert np.array_equal(gguf.dequantize(raw, number).reshape(dequantized.shape), dequantized)
        write_vector(
            __file__,
            name,
            {"weight": torch.from_numpy(raw)},
            torch.from_numpy(dequantized),
            format="gguf",
            quantization_config={"quant_method": "gguf", "types": {"model.layer": kind}},
            group_size=values,
            dequantized_by="dequantize_row of llama.cpp",
            made_by=llama_cpp.WRITER,
            seed=seed,
        )


def main() -> None:
    make_by_llama_cpp()
    for seed, (name, halves) in enumerate(CASES):
        kind = name.split("-")[1].upper()
        out_features, in_features = sizes(name)
        number = gguf.GGMLQuantizationType[kind]
        values, size = gguf.GGML_QUANT_SIZES[number]
        rng = np.random.default_rng(seed)
        if halves is None:
            weight = (rng.standard_normal((out_features, in_features)) * 0.05).astype(np.float32)
            weight[0, :values] = 0  # a block of zeros has the scale 0
            raw = gguf.quantize(weight, number)
        else:
            raw = random_blocks(rng, out_features, in_features // values, size, halves)
        dequantized = gguf.dequantize(raw, number).reshape(out_features, in_features)
        write_vector(
            __file__,
            name,
            {"weight": torch.from_numpy(raw)},
            torch.from_numpy(dequantized),
            format="gguf",
            quantization_config={"quant_method": "gguf", "types": {"model.layer": kind}},
            group_size=values,
            dequantized_by="gguf.dequantize",
            made_by=WRITER,
            seed=seed,
        )


if __name__ == "__main__":
    main()
