"""Make the golden vectors of Quark: integers and MXFP4 with its own packer, FP8 with its formula in torch.

    pip install torch safetensors amd-quark==0.13
    python -m quantization.quark.make_golden

Legend: I in_features, O out_features.
"""

import torch
from quark.torch.kernel import dequantize
from quark.torch.utils.pack import create_pack_method
from torch import Tensor

from quantization.golden_writer import random_weight, write_vector

# name, qscheme, whether activations are static
CASES = (
    ("quark-fp8-tensor-static-o40-i72", "per_tensor", True),
    ("quark-fp8-tensor-dynamic-o24-i64", "per_tensor", False),
    ("quark-fp8-channel-dynamic-o56-i80", "per_channel", False),
)
# name, dtype, qscheme, group size, pack_method; uint4 and uint8 are asymmetric, int4 and int8 symmetric
PACKED = (
    ("quark-int4-group-i96-o40", "int4", "per_group", 32, "reorder"),
    ("quark-uint4-group-order-i128-o24", "uint4", "per_group", 64, "order"),
    ("quark-int4-channel-i72-o40", "int4", "per_channel", None, "reorder"),
    ("quark-uint4-tensor-i64-o24", "uint4", "per_tensor", None, "reorder"),
    ("quark-uint8-group-i96-o24", "uint8", "per_group", 32, "reorder"),
    ("quark-int8-channel-i56-o24", "int8", "per_channel", None, "reorder"),
    ("quark-mxfp4-i96-o40", "fp4", "per_group", 32, "reorder"),
)
WRITER = "amd-quark 0.13"


def pack(
    weight: Tensor, dtype: str, scheme: str, group: int | None, order: str
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the stored tensors, packed by the writer, and what its dequantiser makes of the unpacked ones."""
    reorder, packer = order == "reorder", create_pack_method(scheme, dtype)
    blocks = {
        "per_group": weight.unflatten(1, (-1, group or 1)),
        "per_channel": weight,
        "per_tensor": weight,
    }[scheme]
    axes: tuple[int, ...] = (0, 1) if scheme == "per_tensor" else (-1,)
    low, high = blocks.amin(axes), blocks.amax(axes)
    axis = 0 if scheme == "per_channel" else -1
    if dtype == "fp4":
        exponents = torch.frexp(torch.maximum(-low, high) / 6)[1]
        scale, zero = torch.exp2(exponents.float()), None
        codes = E2M1[(blocks[..., None] / scale[..., None, None] - E2M1).abs().argmin(-1)].flatten(1)
        tensors = {"weight_scale": (exponents + 127).to(torch.uint8)}
    else:
        bits, signed = int(dtype[-1]), dtype[0] == "i"
        top = 2**bits - 1
        scale = torch.maximum(-low, high) / (top / 2) if signed else (high - low) / top
        zero = (
            torch.zeros_like(scale, dtype=torch.int32) if signed else (-low / scale).round().to(torch.int32)
        )
        step, offset = (t.repeat_interleave(group, 1) if group else t.reshape(-1, 1) for t in (scale, zero))
        least = -(2 ** (bits - 1)) if signed else 0
        codes = ((weight / step).round().to(torch.int32) + offset).clamp(least, least + top)
        stored_zero = zero if zero.ndim == 0 else packer.pack(zero, reorder)
        tensors = {
            "weight_scale": scale.t() if group else scale,
            "weight_zero_point": stored_zero.to(torch.int8 if bits == 8 and signed else stored_zero.dtype),
        }
    tensors["weight"] = packer.pack(codes, reorder)
    unpacked = packer.unpack(tensors["weight"], reorder)
    meant = dequantize(dtype, unpacked, scale, zero, axis, group, scheme)
    return tensors, meant.float()


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def packed_config(dtype: str, scheme: str, group: int | None, order: str) -> dict:
    """Return what config.json would say of a layer that `pack` has made."""
    weight = {
        "dtype": dtype,
        "qscheme": scheme,
        "group_size": group,
        "ch_axis": {"per_group": 1, "per_channel": 0, "per_tensor": None}[scheme],
        "is_dynamic": False,
        "symmetric": None if dtype == "fp4" else dtype[0] == "i",
        "scale_format": "e8m0" if dtype == "fp4" else None,
    }
    return {
        "quant_method": "quark",
        "global_quant_config": {
            "weight": weight,
            "input_tensors": None,
            "output_tensors": None,
            "bias": None,
        },
        "exclude": ["lm_head"],
        "export": {"weight_format": "real_quantized", "pack_method": order, "kv_cache_group": []},
    }


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
    for seed, (name, dtype, scheme, group, order) in enumerate(PACKED, 10):
        weight = random_weight(name, seed)
        tensors, dequantized = pack(weight, dtype, scheme, group, order)
        write_vector(
            __file__,
            name,
            tensors,
            dequantized,
            weight,
            format="quark",
            quantization_config=packed_config(dtype, scheme, group, order),
            group_size=group,
            dequantized_by="quark.torch.kernel.dequantize",
            made_by=WRITER,
            note="codes chosen by make_golden.py, packed by the writer",
            seed=seed,
        )


if __name__ == "__main__":
    main()
