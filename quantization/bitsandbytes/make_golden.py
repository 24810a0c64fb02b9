"""Make the bitsandbytes golden vectors with its own quantisers and dequantisers, on a CPU.

    pip install torch safetensors && pip install --no-deps bitsandbytes==0.50.0
    python quantization/bitsandbytes/make_golden.py

The tensors are those that `Linear4bit` and `Linear8bitLt` put in a state dict.

Legend: I in_features, O out_features, B block size.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
WRITER = "bitsandbytes 0.50.0"


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    in_features: int
    out_features: int
    quant_type: str = "nf4"
    block: int = 64
    double: bool = False
    storage: torch.dtype = torch.uint8


CASES = (
    Case(name="bnb-nf4-i128-o64", in_features=128, out_features=64),
    Case(name="bnb-nf4-i96-o40-straddling", in_features=96, out_features=40),
    Case(name="bnb-nf4-i256-o64-b128-double", in_features=256, out_features=64, block=128, double=True),
    Case(name="bnb-fp4-i128-o64", in_features=128, out_features=64, quant_type="fp4"),
    Case(name="bnb-fp4-i96-o24-double", in_features=96, out_features=24, quant_type="fp4", double=True),
    Case(name="bnb-nf4-i128-o32-bf16-storage", in_features=128, out_features=32, storage=torch.bfloat16),
)


def make_4bit(case: Case, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    packed, state = bnb.quantize_4bit(
        weight,
        blocksize=case.block,
        compress_statistics=case.double,
        quant_type=case.quant_type,
        quant_storage=case.storage,
    )
    tensors = {"weight": packed} | {
        f"weight.{key}": value for key, value in state.as_dict(packed=True).items()
    }
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    # Not dequantize_4bit: its CPU kernel starts every row with a new block (0.50.0), which the quantiser does not.
    meant = _dequantize_4bit_compute(
        packed.view(torch.uint8).reshape(-1), absmax, state.code, state.blocksize, weight.shape, torch.float32
    )
    return tensors, meant


def make_int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    tensors = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, bnb.int8_vectorwise_dequant(codes, scales)


def save(
    name: str, tensors: dict[str, Tensor], weight: Tensor, meant: Tensor, settings: dict, **facts
) -> None:
    out_features, in_features = weight.shape
    case = {
        "format": "bitsandbytes",
        "quantization_config": {"quant_method": "bitsandbytes", "llm_int8_skip_modules": None} | settings,
        "in_features": in_features,
        "out_features": out_features,
        "orientation": "weight_float and dequantized are [out_features, in_features]",
        "made_by": WRITER,
    } | facts
    tensors = tensors | {"weight_float": weight, "dequantized": meant.float()}
    path = GOLDEN / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"case": json.dumps(case)})
    print(path)


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for seed, case in enumerate(CASES):
        generator = torch.Generator().manual_seed(seed)
        weight = (torch.randn(case.out_features, case.in_features, generator=generator) * 0.05).bfloat16()
        tensors, meant = make_4bit(case, weight)
        settings = {
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": case.quant_type,
            "bnb_4bit_use_double_quant": case.double,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": str(case.storage).removeprefix("torch."),
        }
        save(
            case.name,
            tensors,
            weight,
            meant,
            settings,
            group_size=case.block,
            block_size=None,
            seed=seed,
            note=None,
            dequantized_by="bitsandbytes.backends.default.ops._dequantize_4bit_compute",
            dequantized_rounded_to="float32",
        )
    weight = (torch.randn(40, 96, generator=torch.Generator().manual_seed(len(CASES))) * 0.05).bfloat16()
    tensors, meant = make_int8(weight)
    settings = {"load_in_4bit": False, "load_in_8bit": True, "llm_int8_threshold": 6.0}
    save(
        "bnb-int8-i96-o40",
        tensors,
        weight,
        meant.bfloat16(),
        settings,
        group_size=None,
        block_size=None,
        seed=len(CASES),
        note="the writer dequantises in float32; rounded to bfloat16 here",
        dequantized_by="bitsandbytes.functional.int8_vectorwise_dequant",
        dequantized_rounded_to="bfloat16",
    )


if __name__ == "__main__":
    main()
