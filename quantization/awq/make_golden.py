"""Make the AWQ golden vectors with AutoAWQ's own quantiser, packer and dequantiser, on a CPU.

    pip install torch safetensors transformers tqdm && pip install --no-deps autoawq==0.2.9
    python -m quantization.awq.make_golden

AutoAWQ is deprecated, and its top-level import loads every model class it knows, which recent transformers
releases break. Only three of its modules matter here, so `import_writer` registers a bare `awq` package that
skips `awq/__init__.py`, and empty stand-ins for `accelerate` and `datasets`, which those modules import but
do not call on this path.

Legend: I in_features, O out_features, G group_size.
"""

import importlib.machinery
import importlib.util
import sys
import types
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from quantization.golden_writer import sizes, write_vector

WRITER = "autoawq 0.2.9"
WRITER_COLUMNS = 32  # from_linear sizes qweight as O // 32 * 4, so it only works where O is a multiple of 32


@dataclass(frozen=True)
class Case:
    name: str
    group_size: int
    _: KW_ONLY
    zero_point: bool = True
    old_spelling: bool = False
    extreme_values: bool = False


CASES = (
    Case("i128-o64-g128", 128),
    Case("i256-o24-g64", 64),
    Case("i384-o8-g32", 32),
    Case("i96-o32-g32", 32),
    Case("i96-o64-whole-row", -1),
    Case("i128-o32-g64-old-spelling", 64, old_spelling=True),
    Case("i64-o32-g32-extreme", 32, extreme_values=True),
    Case("i128-o64-g32-symmetric", 32, zero_point=False),
    Case("i128-o40-g64-symmetric", 64, zero_point=False),
    Case("i192-o32-whole-row-symmetric", -1, zero_point=False),
)


def import_writer() -> tuple:
    """Return AutoAWQ's (AwqQuantizer, WQLinear_GEMM, dequantize_gemm), without its package-level import."""
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


def make_weight(case: Case, shape: tuple[int, int], seed: int) -> Tensor:
    """Make a weight of this shape in float16, like a layer's, or with groups that stress the quantiser."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    if case.extreme_values:
        weight[0] = 0.0  # both scales are the writer's floor, a float16 subnormal
        # All positive: the zero point clamps to 0, and large weights to code 15.
        weight[1] = weight[1].abs() + 0.5
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
    out_features, in_features = sizes(case.name)
    rows = -(-out_features // WRITER_COLUMNS) * WRITER_COLUMNS
    weight = make_weight(case, (rows, in_features), seed)
    # from_linear finds a group as i // group_size, which is out of range for -1; I says the same thing.
    group = in_features if case.group_size == -1 else case.group_size
    notes = ["group_size -1 was given to the packer as in_features"] if case.group_size == -1 else []
    if case.old_spelling:
        notes.append("the fields of an early quant_config.json; quant_method is added")

    settings = types.SimpleNamespace(w_bit=4, group_size=case.group_size, zero_point=case.zero_point)
    # scales, zeros: [O, I/G]
    rounded, scales, zeros = quantizer.pseudo_quantize_tensor(settings, weight.clone())
    if zeros is None:
        zeros = torch.full_like(scales, 8.0)
        notes.append(
            "the quantiser has no zero points for zero_point false: the packer was given 8 everywhere"
        )

    linear = torch.nn.Linear(in_features, rows, bias=False, dtype=torch.float16)
    linear.weight.data = rounded
    scales, zeros = scales.t().contiguous(), zeros.t().contiguous()
    packed = packer.from_linear(linear, 4, group, scales=scales, zeros=zeros)
    dequantized = dequantize(packed.qweight, packed.qzeros, packed.scales, 4, group)  # [I, O] float16

    words = out_features // 8
    if rows != out_features:
        cut = rows - out_features
        notes.append(f"the packer was given {rows} columns; the last {cut} (whole words) are cut off")
    write_vector(
        __file__,
        case.name,
        {
            "qweight": packed.qweight[:, :words],
            "qzeros": packed.qzeros[:, :words],
            "scales": packed.scales[:, :out_features],
        },
        dequantized[:, :out_features].t(),
        weight[:out_features],
        format="awq",
        quantization_config=quantization_config(case),
        group_size=case.group_size,
        dequantized_by="awq.utils.packing_utils.dequantize_gemm",
        made_by=WRITER,
        note="; ".join(notes) or None,
        seed=seed,
    )


def main() -> None:
    writer = import_writer()
    for seed, case in enumerate(CASES):
        make(case, writer, seed=seed)


if __name__ == "__main__":
    main()
