"""Make the golden vectors of Quark FP8 with its formula in torch: the writer runs on GPUs only.

    pip install torch safetensors
    python quantization/quark/make_golden.py

Legend: I in_features, O out_features.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
# name, O, I, qscheme, whether activations are static
CASES = (
    ("quark-fp8-tensor-static-o40-i72", 40, 72, "per_tensor", True),
    ("quark-fp8-tensor-dynamic-o24-i64", 24, 64, "per_tensor", False),
    ("quark-fp8-channel-dynamic-o56-i80", 56, 80, "per_channel", False),
)


def make(weight: Tensor, qscheme: str, static: bool) -> tuple[dict[str, Tensor], dict]:
    """The largest magnitude of the tensor, or of each output, becomes 448."""
    scales = (weight.abs().amax(1) if qscheme == "per_channel" else weight.abs().amax()) / 448
    stored = (weight / scales.reshape(-1, 1)).clamp(-448, 448).to(torch.float8_e4m3fn)
    tensors = {"weight": stored, "weight_scale": scales}
    if static:
        tensors["input_scale"] = torch.tensor(0.02)
    kind = {
        "dtype": "fp8_e4m3",
        "is_dynamic": False,
        "qscheme": qscheme,
        "ch_axis": 0 if scales.ndim else None,
    }
    inputs = {
        "dtype": "fp8_e4m3",
        "is_dynamic": not static,
        "qscheme": qscheme,
        "ch_axis": 1 if scales.ndim else None,
    }
    settings = {
        "quant_method": "quark",
        "global_quant_config": {
            "weight": kind,
            "input_tensors": inputs,
            "output_tensors": None,
            "bias": None,
        },
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": ["lm_head"],
        "export": {"weight_format": "real_quantized", "pack_method": "reorder", "kv_cache_group": []},
    }
    return tensors, settings


def save(name: str, tensors: dict[str, Tensor], weight: Tensor, settings: dict, seed: int) -> None:
    meant = tensors["weight"].float() * tensors["weight_scale"].reshape(-1, 1)
    case = {
        "format": "quark",
        "quantization_config": settings,
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "group_size": None,
        "block_size": None,
        "orientation": "weight_float and dequantized are [out_features, in_features]",
        "dequantized_by": "make_golden.py: weight * weight_scale",
        "dequantized_rounded_to": "float32",
        "made_by": "make_golden.py, after the writer's formula",
        "note": "no writer behind it",
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
