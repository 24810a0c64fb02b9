"""Make the MLX golden vectors with MLX's own quantiser and dequantiser, on a CPU.

    pip install torch safetensors numpy 'mlx[cpu]==0.32.4'
    python -m quantization.mlx.make_golden

The first row of every weight is zero, and the second one value throughout, since both have rules of their own. MLX
computes in the dtype of scales, so these are widened before it dequantises.

Legend: I in_features, O out_features, G group_size.
"""

import mlx.core as mx
import numpy
import torch
from torch import Tensor

from quantization.golden_writer import random_weight, write_vector

WRITER = "mlx 0.32.4"
MX = {torch.float32: mx.float32, torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}
# name, mode, bits, G, dtype of the weight
CASES = (
    ("affine-w1-o24-i64-g32", "affine", 1, 32, torch.float32),
    ("affine-w2-o40-i128-g64", "affine", 2, 64, torch.bfloat16),
    ("affine-w3-o24-i160-g32", "affine", 3, 32, torch.float16),
    ("affine-w4-o40-i128-g64", "affine", 4, 64, torch.bfloat16),
    ("affine-w4-o24-i128-g128", "affine", 4, 128, torch.float32),
    ("affine-w5-o24-i192-g64", "affine", 5, 64, torch.bfloat16),
    ("affine-w6-o24-i96-g32", "affine", 6, 32, torch.bfloat16),
    ("affine-w8-o24-i128-g128", "affine", 8, 128, torch.float16),
    ("mxfp4-o24-i96-g32", "mxfp4", 4, 32, torch.bfloat16),
    ("mxfp8-o24-i128-g32", "mxfp8", 8, 32, torch.float32),
    ("nvfp4-o24-i64-g16", "nvfp4", 4, 16, torch.float32),
    ("nvfp4-global-o24-i64-g16", "nvfp4", 4, 16, torch.float32),
)


def to_mlx(tensor: Tensor) -> mx.array:
    """Convert a float tensor, in its own dtype."""
    return mx.array(tensor.float().numpy()).astype(MX[tensor.dtype])


def to_torch(array: mx.array, dtype: torch.dtype | None = None) -> Tensor:
    """Convert an array.  dtype: of floats that numpy has no type for, through float32; None: the array's own."""
    floats = array if dtype is None else array.astype(mx.float32)
    tensor = torch.from_numpy(numpy.array(floats))
    return tensor if dtype is None else tensor.to(dtype)


def main() -> None:
    mx.set_default_device(mx.cpu)
    for seed, (name, mode, bits, group, dtype) in enumerate(CASES):
        weight = random_weight(name, seed)
        weight[0], weight[1] = 0, 0.03
        weight = weight.to(dtype)
        array, settings = to_mlx(weight), {"group_size": group, "bits": bits, "mode": mode}
        second = mx.max(mx.abs(array)).astype(mx.float32) if "global" in name else None
        words, scales, *biases = mx.quantize(array, **settings, global_scale=second)
        stored = {"weight": to_torch(words), "scales": to_torch(scales, dtype if biases else None)}
        if biases:
            stored["biases"] = to_torch(biases[0], dtype)
        if second is not None:
            stored["global_scale"] = to_torch(second)
        wide = [values.astype(mx.float32) for values in (scales, *biases)] if biases else [scales]
        meant = mx.dequantize(words, *wide, **settings, global_scale=second, dtype=mx.float32)
        write_vector(
            __file__,
            name,
            stored,
            to_torch(meant),
            weight,
            format="mlx",
            quantization_config={"quant_method": "mlx", **settings},
            group_size=group,
            dequantized_by="mlx.core.dequantize",
            made_by=WRITER,
            note="quant_method is for the registry; MLX's own config has none, and stands under quantization",
            seed=seed,
        )


if __name__ == "__main__":
    main()
