"""Make the GGUF golden vectors with llama.cpp's own Python package.

    pip install gguf==0.19.0 torch safetensors
    python -m quantization.gguf.make_golden

The package quantises to the types of 32 values; the K types it only decodes, so theirs are random blocks (every bit of
codes and small scales) with float16 scales of ordinary size. `dequantized` is its `dequantize` of either.

Legend: I in_features, O out_features.
"""

import gguf
import numpy as np
import torch

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


def random_blocks(
    rng: np.random.Generator, rows: int, blocks: int, size: int, halves: tuple[int, ...]
) -> np.ndarray:
    """Make [rows, blocks * size] random bytes, with a small float16 number at the bytes `halves` of each block."""
    raw = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for start in halves:
        values = rng.standard_normal((rows, blocks)) * 2e-4  # of both signs; some are subnormal in float16
        raw[..., start : start + 2] = values.astype(np.float16)[..., None].view(np.uint8)
    return raw.reshape(rows, blocks * size)


def main() -> None:
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
