"""Linear layers over fp4 (e2m1) weights on the CPU, in C++: MXFP4 and NVFP4.

Twice an e2m1 value is an integer from -12 to 12, so that fp4 is a codebook of integers.
"""

from __future__ import annotations

from typing import ClassVar

from pymllm.kernels.native.integer_codebook import NativeIntegerCodebook


class NativeFp4(NativeIntegerCodebook):
    """The kernel for fp4 codes, with scales as the checkpoint has them (e8m0, e4m3 or floats) and a factor a row."""

    name: ClassVar[str] = "native_fp4"
    codebooks: ClassVar[tuple[str, ...]] = ("e2m1",)
