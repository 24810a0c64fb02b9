"""Make the HQQ golden vectors with its own quantiser and dequantiser, on a CPU.

    pip install torch safetensors termcolor numpy && pip install --no-deps hqq==0.2.8.post1
    python quantization/hqq/make_golden.py

Only the tensors that hold the weight are kept; the settings that a state dict repeats as tensors are in the metadata.

Legend: I in_features, O out_features, G group_size.
"""

import json
from pathlib import Path

import torch
from hqq.core.quantize import Quantizer
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "golden"
WRITER = "hqq 0.2.8.post1"
# name, bits, I, O, G
CASES = (
    ("hqq-4bit-g64-i128-o64", 4, 128, 64, 64),
    ("hqq-4bit-g32-i96-o40", 4, 96, 40, 32),
    ("hqq-8bit-g32-i96-o24", 8, 96, 24, 32),
    ("hqq-3bit-g64-i128-o24", 3, 128, 24, 64),
    ("hqq-2bit-g32-i64-o24", 2, 64, 24, 32),
)


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for seed, (name, bits, in_features, out_features, group) in enumerate(CASES):
        weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 0.05
        words, meta = Quantizer.quantize(weight, nbits=bits, group_size=group, axis=1, device="cpu")
        # HQQLinear stores both in its compute dtype, float16; the dequantiser is then asked for float32.
        scale, zero = meta["scale"].half(), meta["zero"].half()
        meta |= {"scale": scale.float(), "zero": zero.float(), "compute_dtype": torch.float32}
        params = {
            "nbits": bits,
            "channel_wise": True,
            "group_size": group,
            "optimize": True,
            "round_zero": False,
            "axis": 1,
            "view_as_float": False,
        }
        case = {
            "format": "hqq",
            "quantization_config": {
                "quant_method": "hqq",
                "quant_config": {
                    "weight_quant_params": params,
                    "scale_quant_params": None,
                    "zero_quant_params": None,
                    "offload_meta": False,
                },
                "skip_modules": ["lm_head"],
            },
            "in_features": in_features,
            "out_features": out_features,
            "group_size": group,
            "block_size": None,
            "orientation": "weight_float and dequantized are [out_features, in_features]",
            "dequantized_by": "hqq.core.quantize.Quantizer.dequantize",
            "dequantized_rounded_to": "bfloat16",
            "made_by": WRITER,
            "note": "the writer dequantises in float32; rounded to bfloat16 here",
            "seed": seed,
        }
        tensors = {
            "W_q": words,
            "scale": scale,
            "zero": zero,
            "weight_float": weight,
            "dequantized": Quantizer.dequantize(words, meta).bfloat16().float(),
        }
        path = GOLDEN / f"{name}.safetensors"
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, path, {"case": json.dumps(case)}
        )
        print(path)


if __name__ == "__main__":
    main()
