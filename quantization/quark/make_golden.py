"""Make the golden vectors of Quark FP8 with its formula in torch: the writer runs on GPUs only.

    pip install torch safetensors
    python -m quantization.quark.make_golden

Legend: I in_features, O out_features.
"""

import torch
from torch import Tensor

from quantization.golden_writer import random_weight, write_vector

# name, qscheme, whether activations are static
CASES = (
    ("quark-fp8-tensor-static-o40-i72", "per_tensor", True),
    ("quark-fp8-tensor-dynamic-o24-i64", "per_tensor", False),
    ("quark-fp8-channel-dynamic-o56-i80", "per_channel", False),
)


def make(weight: Tensor, qscheme: str, static: bool) -> tuple[dict[str, Tensor], dict]:
    """Return the stored tensors and their config: the largest magnitude of tensor, or of output, becomes 448."""
    scales = (weight.abs().amax(1) if qscheme == "per_channel" else weight.abs().amax()) / 448
    stored = (weight / scales.reshape(-1, 1)).clamp(-448, 448).to(torch.float8_e4m3fn)
    tensors = {"weight": stored, "weight_scale": scales}
    if static:
        tensors["input_scale"] = torch.tensor(0.02)
    kind = {"dtype": "fp8_e4m3", "is_dynamic": False, "qscheme": qscheme}
    settings = {
        "quant_method": "quark",
        "global_quant_config": {
            "weight": kind | {"ch_axis": 0 if scales.ndim else None},
            "input_tensors": kind | {"is_dynamic": not static, "ch_axis": 1 if scales.ndim else None},
            "output_tensors": None,
            "bias": None,
        },
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": ["lm_head"],
        "export": {"weight_format": "real_quantized", "pack_method": "reorder", "kv_cache_group": []},
    }
    return tensors, settings


def main() -> None:
    for seed, (name, *options) in enumerate(CASES):
        weight = random_weight(name, seed)
        tensors, settings = make(weight, *options)
        write_vector(
            __file__,
            name,
            tensors,
            tensors["weight"].float() * tensors["weight_scale"].reshape(-1, 1),
            weight,
            format="quark",
            quantization_config=settings,
            dequantized_by="make_golden.py: weight * weight_scale",
            made_by="make_golden.py, after the writer's formula",
            note="no writer behind it",
            seed=seed,
        )


if __name__ == "__main__":
    main()
