"""llama.cpp's own quantisers and dequantisers, in the library that the package `xllamacpp` ships.

    pip install xllamacpp==2026.10.11549

Legend: I in_features, O out_features.
"""

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

WRITER = "llama.cpp (xllamacpp 2026.10.11549)"
# Type: its number (ggml.h).
NUMBERS = {
    "IQ2_XXS": 16,
    "IQ2_XS": 17,
    "IQ3_XXS": 18,
    "IQ1_S": 19,
    "IQ4_NL": 20,
    "IQ3_S": 21,
    "IQ2_S": 22,
    "IQ4_XS": 23,
    "IQ1_M": 29,
    "TQ1_0": 34,
    "TQ2_0": 35,
    "MXFP4": 39,
    "NVFP4": 40,
    "Q1_0": 41,
    "Q2_0": 42,
}


@cache
def library() -> ctypes.CDLL:
    """Load ggml.  Its functions have the types that they are declared with in ggml.h."""
    package = find_spec("xllamacpp")
    assert package is not None and package.origin is not None
    loaded = ctypes.CDLL(str(next(Path(package.origin).parent.glob("*.so"))))
    sizes, pointer = ctypes.c_int64, ctypes.c_void_p
    loaded.ggml_blck_size.argtypes, loaded.ggml_blck_size.restype = [ctypes.c_int], ctypes.c_int64
    loaded.ggml_type_size.argtypes, loaded.ggml_type_size.restype = [ctypes.c_int], ctypes.c_size_t
    loaded.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, sizes, sizes, sizes, pointer]
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    for kind in NUMBERS:
        getattr(loaded, f"dequantize_row_{kind.lower()}").argtypes = [pointer, pointer, sizes]
    return loaded


def block_sizes(kind: str) -> tuple[int, int]:
    """Return the values and the bytes of a block."""
    number = NUMBERS[kind]
    return library().ggml_blck_size(number), library().ggml_type_size(number)


def quantize(weight: np.ndarray, kind: str, importance: np.ndarray) -> np.ndarray:
    """Quantise [O, I] float32 to [O, bytes] uint8.  importance: [I] float32, which some types demand."""
    rows, columns = weight.shape
    values, size = block_sizes(kind)
    raw = np.zeros((rows, columns // values * size), np.uint8)
    sources = weight.ctypes.data, raw.ctypes.data, 0, rows, columns, importance.ctypes.data
    assert library().ggml_quantize_chunk(NUMBERS[kind], *sources) == raw.size
    return raw


def dequantize(raw: np.ndarray, kind: str) -> np.ndarray:
    """Dequantise [O, bytes] uint8 to [O, I] float32."""
    values, size = block_sizes(kind)
    weight = np.zeros((raw.shape[0], raw.shape[1] // size * values), np.float32)
    raw = np.ascontiguousarray(raw)
    getattr(library(), f"dequantize_row_{kind.lower()}")(raw.ctypes.data, weight.ctypes.data, weight.size)
    return weight
