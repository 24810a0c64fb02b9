"""Make the GGUF golden vectors with llama.cpp's own Python package.

    pip install gguf==0.19.0 torch safetensors
    python quantization/gguf/make_golden.py

The package quantises to the types of 32 values; the K types it only decodes, so theirs are random blocks (every bit of
codes and small scales) with float16 scales of ordinary size. `dequantized` is its `dequantize` of either.

Legend: I in_features, O out_features.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "golden"
WRITER = "gguf 0.19.0"
# type, I, O, bytes of the block where float16 numbers begin (K types)
CASES = (
    ("Q4_0", 96, 24, None),
    ("Q4_1", 96, 24, None),
    ("Q5_0", 96, 24, None),
    ("Q5_1", 96, 24, None),
    ("Q8_0", 96, 24, None),
    ("Q2_K", 512, 12, (80, 82)),
    ("Q3_K", 512, 12, (108,)),
    ("Q4_K", 512, 12, (0, 2)),
    ("Q5_K", 512, 12, (0, 2)),
    ("Q6_K", 512, 12, (208,)),
)


def random_blocks(
    rng: np.random.Generator, rows: int, blocks: int, size: int, halves: tuple[int, ...]
) -> np.ndarray:
    raw = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for start in halves:
        values = rng.standard_normal((rows, blocks)) * 2e-4  # of both signs; some are subnormal in float16
        raw[..., start : start + 2] = values.astype(np.float16)[..., None].view(np.uint8)
    return raw.reshape(rows, blocks * size)


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for seed, (kind, in_features, out_features, halves) in enumerate(CASES):
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
        case = {
            "format": "gguf",
            "quantization_config": {"quant_method": "gguf", "types": {"model.layer": kind}},
            "in_features": in_features,
            "out_features": out_features,
            "group_size": values,
            "block_size": None,
            "orientation": "dequantized is [out_features, in_features]",
            "dequantized_by": "gguf.dequantize",
            "dequantized_rounded_to": "float32",
            "made_by": WRITER,
            "seed": seed,
        }
        tensors = {"weight": torch.from_numpy(raw), "dequantized": torch.from_numpy(dequantized)}
        path = GOLDEN / f"gguf-{kind.lower()}-i{in_features}-o{out_features}.safetensors"
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, {"case": json.dumps(case)})
        print(path)


if __name__ == "__main__":
    main()
