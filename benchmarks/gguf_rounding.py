"""Compare how closely GGUF's block types follow weights, made here and by llama.cpp's own quantiser.

    python benchmarks/gguf_rounding.py LIBRARY [--write]

LIBRARY is a libggml-base.so, which packages around llama.cpp and whisper.cpp bring along (pywhispercpp, say). Weights
are random, of several distributions. An error is the distance of what the `gguf` package reads from the bytes, relative
to the weights' norm; the last column is the ratio of the two. The types of 32 values must have the same bytes.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path

import gguf
import numpy as np
import torch

from pymllm.quantization.rounding.gguf import ROUNDING, round_to_blocks
from pymllm.quantization.storage.gguf_pack import pack_blocks

ROWS, COLUMNS = 256, 2048


def distributions() -> dict[str, np.ndarray]:
    """Return weights [ROWS, COLUMNS] float32 by what they are drawn from."""
    rng = np.random.default_rng(0)
    shape = (ROWS, COLUMNS)
    normal = rng.standard_normal(shape)
    found = {
        "normal": normal,
        "Laplace": rng.laplace(size=shape),
        "Student, 3 degrees": rng.standard_t(3, shape),
        "normal, shifted by 1.5": normal + 1.5,
        "normal, 1 of 500 is 30": np.where(rng.random(shape) < 0.002, 30.0, normal),
    }
    return {name: (0.03 * values).astype(np.float32) for name, values in found.items()}


def quantise(library: ctypes.CDLL, weight: np.ndarray, kind: str) -> np.ndarray:
    """Return the bytes that ggml makes of a weight."""
    number = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[number]
    made = np.zeros((weight.shape[0], weight.shape[1] // values * size), np.uint8)
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    source = np.ascontiguousarray(weight)
    function(int(number), source.ctypes.data, made.ctypes.data, 0, *weight.shape, None)
    return made


def distance(raw: np.ndarray, kind: str, weight: np.ndarray) -> float:
    meant = gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])
    return float(np.linalg.norm(meant - weight) / np.linalg.norm(weight))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    library = ctypes.CDLL(str(args.library))
    lines = ["| weights | type | llama.cpp's error | error here | ratio |", "| --- | --- | --- | --- | --- |"]
    worst = 0.0
    for name, weight in distributions().items():
        for kind in ROUNDING:
            theirs = quantise(library, weight, kind)
            ours = pack_blocks(round_to_blocks(torch.from_numpy(weight), kind), kind)
            assert ours is not None
            if not kind.endswith("K"):
                assert np.array_equal(theirs, ours.numpy()), f"{name}, {kind}: other bytes"
            errors = [distance(raw, kind, weight) for raw in (theirs, ours.numpy())]
            worst = max(worst, errors[1] / errors[0])
            same = (
                "the same bytes" if np.array_equal(theirs, ours.numpy()) else f"{errors[1] / errors[0]:.3f}"
            )
            lines.append(f"| {name} | {kind} | {errors[0]:.5f} | {errors[1]:.5f} | {same} |")
    print("\n".join(lines))
    verdict = f"The largest ratio is {worst:.3f}."
    print(verdict)
    if args.write:
        page = Path(__file__).parent / "results" / "gguf_rounding.md"
        intro = (__doc__ or "").split("\n\n")[0]
        command = "`python benchmarks/gguf_rounding.py LIBRARY --write`"
        page.write_text("\n".join(["# GGUF's block types", "", intro, command, "", *lines, "", verdict, ""]))


if __name__ == "__main__":
    main()
