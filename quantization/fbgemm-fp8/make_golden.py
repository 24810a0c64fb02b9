"""Make the golden vectors of FBGEMM FP8 with its formula in torch: the writer runs on GPUs only.

    pip install torch safetensors
    python -m quantization.fbgemm-fp8.make_golden

Legend: I in_features, O out_features.
"""

import torch

from quantization.golden_writer import random_weight, write_vector

NAMES = ("fbgemm-fp8-o56-i72", "fbgemm-fp8-o40-i128")


def main() -> None:
    for seed, name in enumerate(NAMES):
        weight = random_weight(name, seed)
        # As fbgemm's quantize_fp8_row: each row's largest magnitude becomes 448.
        scales = weight.abs().amax(1, keepdim=True) / 448
        stored = (weight / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
        write_vector(
            __file__,
            name,
            {"weight": stored, "weight_scale": scales},
            stored.float() * scales,
            weight,
            format="fbgemm-fp8",
            quantization_config={
                "quant_method": "fbgemm-fp8",
                "activation_scale_ub": 1200.0,
                "modules_to_not_convert": ["lm_head"],
            },
            dequantized_by="make_golden.py: weight * weight_scale",
            made_by="make_golden.py, after the writer's formula",
            note="quant_method is fbgemm_fp8 in checkpoints; readers take - for _",
            seed=seed,
        )


if __name__ == "__main__":
    main()
