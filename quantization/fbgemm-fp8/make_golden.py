"""Make the golden vectors of FBGEMM FP8 with its formula in torch: the writer runs on GPUs only.

    pip install torch safetensors
    python quantization/fbgemm-fp8/make_golden.py

Legend: I in_features, O out_features.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
# name, O, I
CASES = (("fbgemm-fp8-o56-i72", 56, 72), ("fbgemm-fp8-o40-i128", 40, 128))


def make(weight: Tensor) -> tuple[dict[str, Tensor], dict]:
    """As fbgemm's quantize_fp8_row: each row's largest magnitude becomes 448."""
    scales = weight.abs().amax(1, keepdim=True) / 448
    tensors = {"weight": (weight / scales).clamp(-448, 448).to(torch.float8_e4m3fn), "weight_scale": scales}
    settings = {
        "quant_method": "fbgemm-fp8",
        "activation_scale_ub": 1200.0,
        "modules_to_not_convert": ["lm_head"],
    }
    return tensors, settings


def save(name: str, tensors: dict[str, Tensor], weight: Tensor, settings: dict, seed: int) -> None:
    meant = tensors["weight"].float() * tensors["weight_scale"].reshape(-1, 1)
    case = {
        "format": "fbgemm-fp8",
        "quantization_config": settings,
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "group_size": None,
        "block_size": None,
        "orientation": "weight_float and dequantized are [out_features, in_features]",
        "dequantized_by": "make_golden.py: weight * weight_scale",
        "dequantized_rounded_to": "float32",
        "made_by": "make_golden.py, after the writer's formula",
        "note": "quant_method is fbgemm_fp8 in checkpoints; readers take - for _",
        "seed": seed,
    }
    tensors = tensors | {"weight_float": weight, "dequantized": meant}
    path = GOLDEN / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"case": json.dumps(case)})
    print(path)


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for seed, (name, out_features, in_features, *options) in enumerate(CASES):
        weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 0.05
        tensors, settings = make(weight, *options)
        save(name, tensors, weight, settings, seed)


if __name__ == "__main__":
    main()
