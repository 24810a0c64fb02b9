"""Make the GPTQ golden vectors with GPTQModel's own packer and dequantiser, on a CPU.

    pip install torch safetensors transformers numpy && pip install --no-deps gptqmodel==7.6.0
    python -m quantization.gptq.make_golden

GPTQModel's top-level import needs every kernel's dependency. Only `PackableQuantLinear` matters here, so
`import_writer` registers bare packages that skip the `__init__` files, and empty stand-ins for the modules which
that one file imports but does not call on this path. A checkout may stand in for the installation:
`PYTHONPATH=gptqmodel-7.6.0 python -m quantization.gptq.make_golden`.

Legend: I in_features, O out_features, G group_size.
"""

import importlib
import importlib.util
import sys
import types
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantization.golden_writer import sizes, write_vector

WRITER = "gptqmodel 7.6.0"
# What convert_gptq_v2_to_v1_format_module takes off a word; 3 bits go field by field there.
V1_OFFSETS = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True)
class Case:
    """zeros_at_zero: one input group of all-positive weights, whose zero point of 0 borrows under minus one."""

    name: str
    bits: int
    group_size: int
    _: KW_ONLY
    sym: bool = True
    v2: bool = False
    g_idx: bool = True
    desc_act: bool = False
    zeros_at_zero: bool = False


CASES = (
    Case("w4-i128-o64-g64-sym", 4, 64),
    Case("w4-i96-o32-g32-asym", 4, 32, sym=False, g_idx=False),
    Case("w4-i128-o96-g128-asym-borrow", 4, 128, sym=False, zeros_at_zero=True),
    Case("w4-i192-o32-g64-asym-v2", 4, 64, sym=False, v2=True),
    Case("w4-i96-o64-whole-row", 4, -1),
    Case("w2-i128-o32-g32-asym-v2", 2, 32, sym=False, v2=True),
    Case("w2-i64-o64-g32-sym", 2, 32),
    Case("w3-i128-o64-g64-sym", 3, 64),
    Case("w3-i96-o32-g32-asym", 3, 32, sym=False, zeros_at_zero=True),
    Case("w8-i128-o32-g64-asym", 8, 64, sym=False),
    Case("w8-i64-o64-g32-sym-v2", 8, 32, v2=True),
    # In a folder of their own: layers of parts that each order their inputs cannot be fused, nor resampled at random.
    Case("act_order/w4-i256-o64-g64-asym", 4, 64, sym=False, desc_act=True),
    Case("act_order/w3-i128-o32-g32-sym-v2", 3, 32, desc_act=True, v2=True),
)


def import_writer() -> type:
    """Return GPTQModel's PackableQuantLinear, without its package-level imports."""
    found = importlib.util.find_spec("gptqmodel")
    if found is None or found.submodule_search_locations is None:
        raise SystemExit("gptqmodel is not found; run: pip install --no-deps gptqmodel==7.6.0")
    root = Path(next(iter(found.submodule_search_locations)))
    for name in ("gptqmodel", "gptqmodel.nn_modules", "gptqmodel.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package

    class Anything:
        """Stands for any enum, logger or class that a module only mentions."""

        def __getattr__(self, name: str) -> "Anything":
            return Anything()

        def __call__(self, *args, **kwargs) -> "Anything":
            return Anything()

        def __or__(self, other) -> "Anything":
            return self

        __ror__ = __or__

    stand_ins = {
        "adapter.adapter": ("LORA_MERGED_WEIGHT_PATHS", "Adapter"),
        "models._const": ("DEVICE", "PLATFORM"),
        "quantization": ("FORMAT", "METHOD"),
        "utils.backend": ("BACKEND",),
        "utils.env": ("env_flag",),
        "utils.logger": ("setup_logger",),
    }
    for name, attributes in stand_ins.items():
        module = types.ModuleType(f"gptqmodel.{name}")
        vars(module).update({attribute: Anything() for attribute in attributes})
        sys.modules[f"gptqmodel.{name}"] = module

    class NoLimits:
        def __init__(self, *args) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *error) -> None: ...

    safe = types.ModuleType("gptqmodel.utils.safe")
    safe.THREADPOOLCTL = types.SimpleNamespace(threadpool_limits=NoLimits)
    sys.modules["gptqmodel.utils.safe"] = safe
    return importlib.import_module("gptqmodel.nn_modules.qlinear").PackableQuantLinear


def make_weight(case: Case, generator: torch.Generator) -> Tensor:
    """Make a weight [O, I] in float16."""
    weight = torch.randn(sizes(case.name), generator=generator) * 0.05
    if case.zeros_at_zero:
        weight[1::5] = weight[1::5].abs()  # 0 is the smallest: zero points of 0
    return weight.half()


def find_parameters(case: Case, weight: Tensor, g_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales (float16) and zero points [O, I/G], by the extremes of each group, as GPTQ's quantiser."""
    top = 2**case.bits - 1
    scales, zeros = [], []
    for group in range(int(g_idx.max()) + 1):
        columns = weight[:, g_idx == group].float()
        low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
        if case.sym:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high - low) / top).half().float()
        scales.append(scale)
        middle = torch.full_like(scale, (top + 1) // 2)
        zeros.append(middle if case.sym else (-low / scale).round().clamp(0, top))
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def minus_one(module: torch.nn.Module, bits: int) -> Tensor:
    """Return qzeros as checkpoint_format gptq stores them."""
    if bits in V1_OFFSETS:
        return module.qzeros - V1_OFFSETS[bits]
    # bits, lowest first
    stream = (module.qzeros.view(torch.uint8).long().unsqueeze(-1) >> torch.arange(8)) & 1
    stream = stream.reshape(module.qzeros.shape[0], -1, bits)
    fields = ((stream << torch.arange(bits)).sum(-1) - 1) & (2**bits - 1)
    stream = (fields.unsqueeze(-1) >> torch.arange(bits)) & 1
    octets = (stream.reshape(module.qzeros.shape[0], -1, 8) << torch.arange(8)).sum(-1)
    return octets.to(torch.uint8).contiguous().view(torch.int32)


def make(case: Case, packer: type, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = make_weight(case, generator)
    out_features, in_features = weight.shape
    g_idx = torch.arange(in_features) // (in_features if case.group_size == -1 else case.group_size)
    if case.desc_act:
        g_idx = g_idx[torch.randperm(in_features, generator=generator)]
    g_idx = g_idx.to(torch.int32)
    scales, zeros = find_parameters(case, weight, g_idx)

    module = packer.__new__(packer)
    torch.nn.Module.__init__(module)
    vars(module).update(
        bits=case.bits,
        planar=False,
        pack_factor=32 // case.bits,
        pack_dtype=torch.int32,
        pack_dtype_bits=32,
        pack_np_math_dtype="uint32",
        pack_np_dtype="int32",
        maxq=2**case.bits - 1,
        in_features=in_features,
        dequant_dtype=torch.int16 if case.bits == 8 else torch.int8,
        enable_wf_unsqueeze=True,
    )
    linear = torch.nn.Linear(in_features, out_features, bias=False)
    linear.weight.data = weight.float()
    packer.pack_original(module, linear, scales, zeros, g_idx)
    dequantized = packer.dequantize_weight(module)  # [I, O] float16, from zero points as they are (v2)

    tensors = {
        "qweight": module.qweight,
        "qzeros": module.qzeros if case.v2 else minus_one(module, case.bits),
        "scales": module.scales,
    }
    if case.g_idx:
        tensors["g_idx"] = g_idx
    write_vector(
        __file__,
        case.name,
        tensors,
        dequantized.t(),
        weight,
        format="gptq",
        quantization_config={
            "quant_method": "gptq",
            "bits": case.bits,
            "group_size": case.group_size,
            "desc_act": case.desc_act,
            "sym": case.sym,
            "checkpoint_format": "gptq_v2" if case.v2 else "gptq",
            "lm_head": False,
            "pack_dtype": "int32",
        },
        group_size=case.group_size,
        dequantized_by="gptqmodel.nn_modules.qlinear.PackableQuantLinear.dequantize_weight",
        made_by=WRITER,
        note=None if case.v2 else "minus one as in convert_gptq_v2_to_v1_format_module, after packing",
        seed=seed,
    )


def main() -> None:
    packer = import_writer()
    for seed, case in enumerate(CASES):
        make(case, packer, seed=seed)


if __name__ == "__main__":
    main()
