"""Make the FP8 golden vectors with the real writers' own code, on a CPU.

    pip install torch safetensors transformers==5.23.0 compressed-tensors==0.20.0
    python -m quantization.fp8.make_golden

Three makers, named in each file's metadata:
- transformers' fine-grained FP8 conversion ops (`quant_method: fp8`, `weight_scale_inv`);
- compressed-tensors' module compressor (`format: float-quantized`), scales from its own calculate_qparams;
- the plain formula of README.md for the per-tensor `weight_scale` / `input_scale` spelling of
  `quant_method: fp8`, whose writer (AutoFP8) llm-compressor has superseded.

Legend: I in_features, O out_features.
"""

import json
import types
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import compressed_tensors
import torch
import transformers
from compressed_tensors.compressors import compress_module, decompress_module
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    initialize_module_for_quantization,
)
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.utils.quantization_config import FineGrainedFP8Config

from quantization.golden_writer import random_weight, write_vector

FP8_MAX = 448.0
TRANSFORMERS = f"transformers {transformers.__version__}"
COMPRESSED_TENSORS = f"compressed-tensors {compressed_tensors.__version__}"
FORMULA = "the formula in quantization/fp8/README.md (no writer's code)"


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable
    dtype: torch.dtype = torch.float32  # the model's dtype before quantisation
    _: KW_ONLY
    block_size: tuple[int, int] | None = None
    strategy: str = "tensor"  # compressed-tensors: tensor, channel or block
    static: bool = False  # activation scale stored in the checkpoint
    scale_fmt: str = "float"


@dataclass(frozen=True, kw_only=True)
class Result:
    tensors: dict[str, Tensor]
    dequantized: Tensor
    quantization_config: dict
    format: str
    made_by: str
    dequantized_by: str
    note: str | None = None


def make_weight(case: Case, *, seed: int) -> Tensor:
    """Make a weight [O, I] in case.dtype, like a layer's, with a few rows that stress scales and the FP8 range."""
    weight = random_weight(case.name, seed)
    weight[0] = 0.0
    weight[1] *= 1e-3
    weight[2, ::3] = -0.0
    weight[-1, -1] = 1.25
    if case.block_size is not None:
        height, width = case.block_size
        weight[:height, -1 - (weight.shape[1] - 1) % width :] = 0.0  # one block of zeros
    return weight.to(case.dtype)


def make_input_scale(*, dtype: torch.dtype, seed: int) -> Tensor:
    """Make a scalar activation scale, as a min-max observer over one calibration batch leaves it."""
    generator = torch.Generator().manual_seed(1000 + seed)
    activations = torch.randn(64, 32, generator=generator).to(dtype)
    return activations.abs().amax() / FP8_MAX


def with_transformers(case: Case, weight: Tensor, *, seed: int) -> Result:
    block = list(case.block_size) if case.block_size else None
    config = FineGrainedFP8Config(weight_block_size=block, scale_fmt=case.scale_fmt)
    quantizer = types.SimpleNamespace(quantization_config=config)

    # Its quantiser leaves a weight alone unless both sizes are whole blocks: pad with zeros, which change no
    # block's maximum, and cut the padding off again. The grid is then ceil(size / block), as readers want.
    rows, columns = weight.shape
    padded, note = weight, None
    if block is not None:
        pad = [-columns % block[1], -rows % block[0]]
        if any(pad):
            padded = torch.nn.functional.pad(weight, (0, pad[0], 0, pad[1]))
            note = f"the quantiser was given {list(padded.shape)}, zero-padded to whole blocks, then cropped"
    stored = Fp8Quantize(quantizer).convert({"weight": padded})
    restored = Fp8Dequantize(quantizer).convert(
        {"weight": stored["weight"], "weight_scale_inv": stored["weight_scale_inv"]}
    )
    return Result(
        tensors={"weight": stored["weight"][:rows, :columns], "weight_scale_inv": stored["weight_scale_inv"]},
        dequantized=restored["weight"][:rows, :columns],
        quantization_config=json.loads(json.dumps(config.to_dict())),
        format="fp8",
        made_by=TRANSFORMERS,
        dequantized_by="transformers Fp8Dequantize",
        note=note,
    )


def with_formula(case: Case, weight: Tensor, *, seed: int) -> Result:
    scale = weight.float().abs().amax() / FP8_MAX  # [] float32
    stored = (weight.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    tensors = {"weight": stored, "weight_scale": scale}
    if case.static:
        tensors["input_scale"] = make_input_scale(dtype=torch.float32, seed=seed)
    return Result(
        tensors=tensors,
        dequantized=(stored.double() * scale.double()).float(),
        quantization_config={
            "quant_method": "fp8",
            "activation_scheme": "static" if case.static else "dynamic",
            "ignored_layers": ["lm_head"],
        },
        format="fp8",
        made_by=FORMULA,
        dequantized_by="weight * weight_scale in float64, rounded to float32",
    )


def compressed_tensors_scheme(case: Case) -> QuantizationScheme:
    weights = QuantizationArgs(
        num_bits=8,
        type="float",
        strategy=case.strategy,
        symmetric=True,
        dynamic=False,
        block_structure=list(case.block_size) if case.strategy == "block" else None,
    )
    if case.static:
        inputs = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
    elif case.strategy == "block":
        group = case.block_size[1]
        inputs = QuantizationArgs(
            num_bits=8, type="float", strategy="group", group_size=group, symmetric=True, dynamic=True
        )
    else:
        inputs = QuantizationArgs(num_bits=8, type="float", strategy="token", symmetric=True, dynamic=True)
    return QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=inputs, format="float-quantized"
    )


def observed_range(case: Case, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (minimum, maximum) of every part of the weight that gets its own scale, in the scale's shape."""
    if case.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if case.strategy == "channel":
        return weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
    height, width = case.block_size
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
    tiles = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))  # [O/height, height, I/width, width]
    return tiles.amin(dim=(1, 3)), tiles.amax(dim=(1, 3))


def with_compressed_tensors(case: Case, weight: Tensor, *, seed: int) -> Result:
    scheme = compressed_tensors_scheme(case)
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=case.dtype)
    layer.weight.data = weight.clone()
    initialize_module_for_quantization(layer, scheme)
    scale, _ = calculate_qparams(*observed_range(case, weight), scheme.weights)
    layer.weight_scale.data.copy_(scale)
    if case.static:
        layer.input_scale.data.copy_(make_input_scale(dtype=case.dtype, seed=seed))
    compress_module(layer)
    tensors = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    decompress_module(layer)

    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="float-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
    ).model_dump()
    config |= {"version": compressed_tensors.__version__, "sparsity_config": {}, "transform_config": {}}
    return Result(
        tensors=tensors,
        dequantized=layer.weight.detach(),
        quantization_config=json.loads(json.dumps(config)),
        format="float-quantized",
        made_by=COMPRESSED_TENSORS,
        dequantized_by="compressed_tensors decompress_module",
    )


BF16, F16 = torch.bfloat16, torch.float16
CASES = (
    Case("fp8-block64x32-o128-i96", with_transformers, F16, block_size=(64, 32)),
    Case("fp8-block128-o200-i144", with_transformers, F16, block_size=(128, 128)),
    Case("fp8-block32x64-ue8m0-o96-i128", with_transformers, F16, block_size=(32, 64), scale_fmt="ue8m0"),
    Case("fp8-tensor-scale-inv-o40-i56", with_transformers),
    Case("fp8-tensor-static-o72-i48", with_formula, static=True),
    Case("fp8-tensor-dynamic-o24-i40", with_formula),
    Case("ct-tensor-static-f32-o72-i48", with_compressed_tensors, static=True),
    Case("ct-tensor-static-bf16-o40-i24", with_compressed_tensors, BF16, static=True),
    Case("ct-channel-dynamic-f32-o56-i72", with_compressed_tensors, strategy="channel"),
    Case("ct-channel-dynamic-bf16-o72-i80", with_compressed_tensors, BF16, strategy="channel"),
    Case(
        "ct-block128-bf16-o136-i144", with_compressed_tensors, BF16, strategy="block", block_size=(128, 128)
    ),
    Case("ct-block128-f16-o40-i256", with_compressed_tensors, F16, strategy="block", block_size=(128, 128)),
)


def main() -> None:
    for seed, case in enumerate(CASES):
        weight = make_weight(case, seed=seed)
        result = case.make(case, weight, seed=seed)
        write_vector(
            __file__,
            case.name,
            result.tensors,
            result.dequantized,
            weight if case.dtype == F16 else weight.float(),
            format=result.format,
            quantization_config=result.quantization_config,
            block_size=case.block_size,
            dequantized_by=result.dequantized_by,
            made_by=result.made_by,
            note=result.note,
            seed=seed,
        )


if __name__ == "__main__":
    main()
