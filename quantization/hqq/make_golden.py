"""Make the HQQ golden vectors with its own quantiser and dequantiser, on a CPU.

    pip install torch safetensors termcolor numpy && pip install --no-deps hqq==0.2.8.post1
    python -m quantization.hqq.make_golden

Only the tensors that hold the weight are kept; the settings that a state dict repeats as tensors are in the metadata.

Legend: I in_features, O out_features, G group_size.
"""

import torch
from hqq.core.quantize import Quantizer

from quantization.golden_writer import random_weight, write_vector

WRITER = "hqq 0.2.8.post1"
# name, bits, G
CASES = (
    ("hqq-4bit-g64-i128-o64", 4, 64),
    ("hqq-4bit-g32-i96-o40", 4, 32),
    ("hqq-8bit-g32-i96-o24", 8, 32),
    ("hqq-3bit-g64-i128-o24", 3, 64),
    ("hqq-2bit-g32-i64-o24", 2, 32),
)


def main() -> None:
    for seed, (name, bits, group) in enumerate(CASES):
        weight = random_weight(name, seed)
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
        write_vector(
            __file__,
            name,
            {"W_q": words, "scale": scale, "zero": zero},
            Quantizer.dequantize(words, meta).bfloat16(),
            weight,
            format="hqq",
            quantization_config={
                "quant_method": "hqq",
                "quant_config": {
                    "weight_quant_params": params,
                    "scale_quant_params": None,
                    "zero_quant_params": None,
                    "offload_meta": False,
                },
                "skip_modules": ["lm_head"],
            },
            group_size=group,
            dequantized_by="hqq.core.quantize.Quantizer.dequantize",
            made_by=WRITER,
            note="the writer dequantises in float32; rounded to bfloat16 here",
            seed=seed,
        )


if __name__ == "__main__":
    main()
