"""Make the AWQ golden vectors with AutoAWQ's own quantiser, packer and dequantiser, on a CPU.

    pip install torch safetensors transformers tqdm && pip install --no-deps autoawq==0.2.9
    python quantization/awq/make_golden.py

AutoAWQ is deprecated, and its top-level import loads every model class it knows, which recent transformers
releases break. Only three of its modules matter here, so `import_writer` registers a bare `awq` package that
skips `awq/__init__.py`, and empty stand-ins for `accelerate` and `datasets`, which those modules import but
do not call on this path.

Legend: I in_features, O out_features, G group_size.
"""

import importlib.machinery
import importlib.util
import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
WRITER = "autoawq 0.2.9"
WRITER_COLUMNS = 32  # from_linear sizes qweight as O // 32 * 4, so it only works where O is a multiple of 32


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    in_features: int
    out_features: int
    group_size: int
    zero_point: bool = True
    old_spelling: bool = False
    extreme_values: bool = False


CASES = (
    Case(name="i128-o64-g128", in_features=128, out_features=64, group_size=128),
    Case(name="i256-o24-g64", in_features=256, out_features=24, group_size=64),
    Case(name="i384-o8-g32", in_features=384, out_features=8, group_size=32),
    Case(name="i96-o32-g32", in_features=96, out_features=32, group_size=32),
    Case(name="i96-o64-whole-row", in_features=96, out_features=64, group_size=-1),
    Case(
        name="i128-o32-g64-old-spelling", in_features=128, out_features=32, group_size=64, old_spelling=True
    ),
    Case(name="i64-o32-g32-extreme", in_features=64, out_features=32, group_size=32, extreme_values=True),
    Case(name="i128-o64-g32-symmetric", in_features=128, out_features=64, group_size=32, zero_point=False),
    Case(name="i128-o40-g64-symmetric", in_features=128, out_features=40, group_size=64, zero_point=False),
    Case(
        name="i192-o32-whole-row-symmetric", in_features=192, out_features=32, group_size=-1, zero_point=False
    ),
)


def import_writer() -> tuple:
    """AutoAWQ's (AwqQuantizer, WQLinear_GEMM, dequantize_gemm), without its package-level import."""
    found = importlib.util.find_spec("awq")
    if found is None or found.submodule_search_locations is None:
        raise SystemExit("autoawq is not installed; run: pip install --no-deps autoawq==0.2.9")
    package = types.ModuleType("awq")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["awq"] = package
    for name, attributes in (("accelerate", {}), ("datasets", {"load_dataset": None})):
        if importlib.util.find_spec(name) is None:
            stand_in = types.ModuleType(name)
            stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
            vars(stand_in).update(attributes)
            sys.modules[name] = stand_in

    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.quantize.quantizer import AwqQuantizer
    from awq.utils.packing_utils import dequantize_gemm

    return AwqQuantizer, WQLinear_GEMM, dequantize_gemm


def make_weight(case: Case, *, rows: int, seed: int) -> Tensor:
    """[rows, I] float16, like a layer's weights, or with groups that stress the quantiser."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, case.in_features, generator=generator) * 0.05
    if case.extreme_values:
        weight[0] = 0.0  # both scales are the writer's floor, a float16 subnormal
        weight[1] = (
            weight[1].abs() + 0.5
        )  # all positive: zero point clamps to 0, and large weights to code 15
        weight[2] = -weight[2].abs() - 0.5  # all negative: zero point clamps to 15
        weight[3] *= 4000.0
        weight[4] *= 1e-4
        weight[5, ::2] = 0.0
        weight[6, 0], weight[6, 1] = 30000.0, -30000.0
    return weight.to(torch.float16)


def quantization_config(case: Case) -> dict:
    if case.old_spelling:
        return {
            "zero_point": case.zero_point,
            "q_group_size": case.group_size,
            "w_bit": 4,
            "version": "GEMM",
            "quant_method": "awq",
        }
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": case.group_size,
        "zero_point": case.zero_point,
        "version": "gemm",
        "modules_to_not_convert": None,
    }


def make(case: Case, writer: tuple, *, seed: int) -> None:
    quantizer, packer, dequantize = writer
    rows = -(-case.out_features // WRITER_COLUMNS) * WRITER_COLUMNS
    weight = make_weight(case, rows=rows, seed=seed)
    # from_linear finds a group as i // group_size, which is out of range for -1; I says the same thing.
    group = case.in_features if case.group_size == -1 else case.group_size
    notes = ["group_size -1 was given to the packer as in_features"] if case.group_size == -1 else []
    if case.old_spelling:
        notes.append("the fields of an early quant_config.json; quant_method is added")

    settings = types.SimpleNamespace(w_bit=4, group_size=case.group_size, zero_point=case.zero_point)
    rounded, scales, zeros = quantizer.pseudo_quantize_tensor(
        settings, weight.clone()
    )  # scales, zeros: [O, I/G]
    if zeros is None:
        zeros = torch.full_like(scales, 8.0)
        notes.append(
            "the quantiser has no zero points for zero_point false: the packer was given 8 everywhere"
        )

    linear = torch.nn.Linear(case.in_features, rows, bias=False, dtype=torch.float16)
    linear.weight.data = rounded
    packed = packer.from_linear(
        linear, 4, group, scales=scales.t().contiguous(), zeros=zeros.t().contiguous()
    )
    dequantized = dequantize(packed.qweight, packed.qzeros, packed.scales, 4, group)  # [I, O] float16

    out, words = case.out_features, case.out_features // 8
    if rows != out:
        notes.append(f"the packer was given {rows} columns; the last {rows - out} (whole words) are cut off")
    tensors = {
        "qweight": packed.qweight[:, :words],
        "qzeros": packed.qzeros[:, :words],
        "scales": packed.scales[:, :out],
        "weight_float": weight[:out],
        "dequantized": dequantized[:, :out].t().float(),
    }
    description = {
        "format": "awq",
        "quantization_config": quantization_config(case),
        "in_features": case.in_features,
        "out_features": out,
        "group_size": case.group_size,
        "block_size": None,
        "orientation": "weight_float and dequantized are [out_features, in_features]",
        "dequantized_by": "awq.utils.packing_utils.dequantize_gemm",
        "dequantized_rounded_to": "float16",
        "made_by": WRITER,
        "note": "; ".join(notes) or None,
        "seed": seed,
    }
    path = GOLDEN / f"{case.name}.safetensors"
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        path,
        {"case": json.dumps(description)},
    )


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    writer = import_writer()
    for seed, case in enumerate(CASES):
        make(case, writer, seed=seed)
        print(GOLDEN / f"{case.name}.safetensors")


if __name__ == "__main__":
    main()
