"""Make vectors of keys and values as compressed-tensors rounds them on their way into a cache.

    pip install torch safetensors compressed-tensors
    python -m quantization.kv_cache.make_vectors

Legend: Hkv key heads, T tokens, D head size.
"""

import json
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize

from quantization.golden_writer import save

VECTORS = Path(__file__).parent / "vectors"
HEADS, TOKENS, SIZE = 3, 7, 16


def main() -> None:
    for seed, (kind, strategy) in enumerate(
        (k, s) for k in ("float", "int") for s in ("tensor", "attn_head")
    ):
        scheme = {
            "num_bits": 8,
            "type": kind,
            "strategy": strategy,
            "dynamic": False,
            "symmetric": True,
        }
        args = QuantizationArgs(**scheme)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, HEADS, TOKENS, SIZE, generator=generator)
        x[0, 0, 0, 0], x[0, 1, 2, 3], x[0, 2, 4] = 40.0, -40.0, 0.0  # beyond the scale's reach, and zeros
        shape = (1,) if strategy == "tensor" else (HEADS, 1, 1)
        largest = 448 if kind == "float" else 127
        scale = 3 / largest * (1 + torch.rand(shape, generator=generator))
        zero_point = torch.zeros(shape, dtype=args.pytorch_dtype())
        tensors = {"x": x, "scale": scale, "rounded": fake_quantize(x, scale, zero_point, args)}
        path = VECTORS / f"{kind}8-{strategy}.safetensors"
        save(path, tensors, kv_cache_scheme=json.dumps(scheme), made_by="compressed-tensors fake_quantize")


if __name__ == "__main__":
    main()
