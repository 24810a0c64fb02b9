"""Make the bitsandbytes golden vectors with its own quantisers and dequantisers, on a CPU.

    pip install torch safetensors && pip install --no-deps bitsandbytes==0.50.0
    python -m quantization.bitsandbytes.make_golden

The tensors are those that `Linear4bit` and `Linear8bitLt` put in a state dict.

Legend: I in_features, O out_features, B block size.
"""

from dataclasses import dataclass

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from torch import Tensor

from quantization.golden_writer import random_weight, write_vector

WRITER = "bitsandbytes 0.50.0"
LAST = ("made_by", "group_size", "block_size", "seed", "note", "dequantized_by", "dequantized_rounded_to")


@dataclass(frozen=True)
class Case:
    name: str
    quant_type: str = "nf4"
    block: int = 64
    double: bool = False
    storage: torch.dtype = torch.uint8


CASES = (
    Case("bnb-nf4-i128-o64"),
    Case("bnb-nf4-i96-o40-straddling"),
    Case("bnb-nf4-i256-o64-b128-double", block=128, double=True),
    Case("bnb-fp4-i128-o64", "fp4"),
    Case("bnb-fp4-i96-o24-double", "fp4", double=True),
    Case("bnb-nf4-i128-o32-bf16-storage", storage=torch.bfloat16),
)


def make_4bit(case: Case, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the stored tensors and their float32 meaning."""
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
    """Return the stored tensors and their bfloat16 meaning."""
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    tensors = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, bnb.int8_vectorwise_dequant(codes, scales).bfloat16()


def write(name: str, made: tuple[dict[str, Tensor], Tensor], weight: Tensor, settings: dict, **facts) -> None:
    """Write a vector of the stored tensors and their meaning, `made`."""
    write_vector(
        __file__,
        name,
        *made,
        weight,
        last=LAST,
        format="bitsandbytes",
        quantization_config={"quant_method": "bitsandbytes", "llm_int8_skip_modules": None} | settings,
        made_by=WRITER,
        **facts,
    )


def main() -> None:
    for seed, case in enumerate(CASES):
        weight = random_weight(case.name, seed).bfloat16()
        settings = {
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": case.quant_type,
            "bnb_4bit_use_double_quant": case.double,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": str(case.storage).removeprefix("torch."),
        }
        write(
            case.name,
            make_4bit(case, weight),
            weight,
            settings,
            group_size=case.block,
            seed=seed,
            note=None,
            dequantized_by="bitsandbytes.backends.default.ops._dequantize_4bit_compute",
        )
    name = "bnb-int8-i96-o40"
    weight = random_weight(name, len(CASES)).bfloat16()
    write(
        name,
        make_int8(weight),
        weight,
        {"load_in_4bit": False, "load_in_8bit": True, "llm_int8_threshold": 6.0},
        seed=len(CASES),
        note="the writer dequantises in float32; rounded to bfloat16 here",
        dequantized_by="bitsandbytes.functional.int8_vectorwise_dequant",
    )


if __name__ == "__main__":
    main()
