"""Does what runs compute what the checkpoint says?  Every layer's kernel against float64 over the file's own tensors.

The reference reads each layer's tensors from the file again, decodes them with the format alone and multiplies in
float64; the packed weights, the kernel and its activation dtype are what is under test.
"""

# N test rows, O out_features, I in_features

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.checking.divergence import EndToEnd, measure_end_to_end
from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight, relative_error
from pymllm.kernels.linear import TOLERANCES
from pymllm.layers.embedding import ParallelLMHead
from pymllm.layers.linear import WeightedLayer, layer_parts
from pymllm.loading.load import load_prepared
from pymllm.loading.match import Placement
from pymllm.loading.prepare import Prepared, prepare
from pymllm.loading.stored import read_slot, read_stored
from pymllm.moe.experts import Experts
from pymllm.planning.make_plan import make_plan
from pymllm.quantization.binding import BoundWeight, bound_weight
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.experts import Product
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.rules import RuleSource
from pymllm.weights.loader import Written, place_experts, write
from pymllm.weights.memory import refuse_too_large
from pymllm.weights.spec import LinearShape

ROWS = 5
MAGNITUDES = {"ordinary": 1.0, "large": 200.0}  # f16 sums stay below 65504 for the layers that models have


@dataclass(frozen=True)
class LayerCheck:
    """One layer (or one part of it).

    errors: relative error to float64 by magnitude of the inputs.  tolerance: what its dtype and numerics explain.
    packed_exact: whether the packed weight decodes to the very values of the format.
    quantisation_error: relative distance of the weight that runs to the one stored, where a rule converts; else 0.
    """

    prefix: str
    kind: str
    method: str
    kernel: str
    numerics: str
    errors: dict[str, float]
    tolerance: float
    packed_exact: bool
    quantisation_error: float

    @property
    def worst(self) -> float:
        """The largest error, in units of the tolerance; NaN counts as infinite."""
        ratios = [error / self.tolerance for error in self.errors.values()]
        return max(math.inf if math.isnan(ratio) else ratio for ratio in ratios)

    @property
    def ok(self) -> bool:
        return self.packed_exact and self.worst <= 1


@dataclass(frozen=True)
class Verification:
    """All layers, the worst first."""

    model: str
    layers: list[LayerCheck]
    end_to_end: EndToEnd | None = None

    @property
    def ok(self) -> bool:
        return all(layer.ok for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        layers = [{**asdict(layer), "worst": layer.worst, "ok": layer.ok} for layer in self.layers]
        whole = None if self.end_to_end is None else asdict(self.end_to_end)
        return {
            "schema_version": 1,
            "model": self.model,
            "ok": self.ok,
            "layers": layers,
            "end_to_end": whole,
        }

    def table(self, top: int | None = None) -> str:
        """The worst `top` layers (all without it), one a line."""
        lines = [f"{'error':>9} {'(large)':>9} {'allowed':>9} {'requant.':>9}  layer"]
        for layer in self.layers[:top]:
            state = "" if layer.ok else "  FAILS" + ("" if layer.packed_exact else ": packed weight differs")
            lines.append(
                f"{layer.errors['ordinary']:9.2e} {layer.errors['large']:9.2e} {layer.tolerance:9.1e} "
                f"{layer.quantisation_error:9.2e}  {layer.prefix} ({layer.method} -> {layer.kernel}){state}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        failed = sum(not layer.ok for layer in self.layers)
        verdict = "all within tolerance" if self.ok else f"{failed} FAIL"
        lines = [f"{self.table(10)}\n{self.model}: {len(self.layers)} layers against float64, {verdict}"]
        return "\n".join(lines + (self.end_to_end.lines() if self.end_to_end else []))


def verify(
    path_or_model: str | Path | Any,
    quant: RuleSource = None,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    compute: str = "auto",
    kernels: Mapping[str, str] | None = None,
    kv_cache: RuleSource = None,
    revision: str | None = None,
    end_to_end: bool = False,
    text: str | Path | None = None,
    tokens: int = 2048,
    window: int = 512,
    check_memory: bool = True,
) -> Verification:
    """Check every layer that holds weights.

    path_or_model: a folder or hub id, which is loaded; or a loaded model (`load_model`'s, or an `LLM`), whose
    checkpoint is read again. The other arguments are `load_model`'s and go with a path alone, as these do:
    end_to_end: also compare next-token distributions with those of the weights in float32, on random token ids.
    check_memory: refuse, with numbers, a model that does not fit.
    text: the same on a text file, with its perplexity.  tokens, window: how many, in windows of how many.
    """
    whole = None
    if isinstance(path_or_model, (str, Path)):
        where: dict[str, Any] = {
            "path": path_or_model,
            "quant": quant,
            "device": device,
            "revision": revision,
        }
        prepared = prepare(**where, dtype=dtype, compute=compute, kernels=kernels, kv_cache=kv_cache)
        if check_memory:
            needed = make_plan(prepared).totals["peak_load_bytes"]
            refuse_too_large(needed, prepared.execution.device, str(prepared.checkpoint.path))
        model = load_prepared(prepared)
        if end_to_end or text is not None:
            whole = measure_end_to_end(prepared, model, where, text=text, tokens=tokens, window=window)
    else:
        found = getattr(path_or_model, "prepared", None)
        if quant is not None or end_to_end or text is not None or not isinstance(found, Prepared):
            raise ConfigError(
                "verify takes a checkpoint with rules, or a model that load_model made",
                code="verify-argument",
                found=type(path_or_model).__name__,
            )
        prepared = found
    with prepared.checkpoint, torch.no_grad():
        checks = [
            check for unit in prepared.units for check in _check_unit(unit.module, unit.placements, prepared)
        ]
    worst_first = sorted(checks, key=lambda check: check.worst, reverse=True)
    return Verification(str(prepared.checkpoint.path), worst_first, whole)


def _check_unit(module: nn.Module, placements: tuple[Placement, ...], prepared: Prepared) -> list[LayerCheck]:
    if isinstance(module, Experts):
        return [] if module.empty else [_check_experts(module, placements)]
    if not isinstance(module, WeightedLayer):
        return []
    if isinstance(module, ParallelLMHead) and module.shares_table:
        placements = next(unit.placements for unit in prepared.units if unit.module is module.tied_to)
        owner: nn.Module | None = module.tied_to
    else:
        owner = None
    checks = []
    for method, shape, holder in layer_parts(module):
        bound = bound_weight(holder)
        assert bound is not None
        stored = read_stored(method, shape, [p for p in placements if p.module is (owner or holder)])
        name = module.prefix if isinstance(module, ParallelLMHead) else shape.name
        checks.append(_check_weight(name, module.kind, method, shape, bound, stored))
    return checks


def _check_weight(
    name: str,
    kind: str,
    method: LinearMethodBase,
    shape: LinearShape,
    bound: BoundWeight,
    stored: dict[str, Tensor],
) -> LayerCheck:
    problem, kernel = bound.problem, bound.selection.kernel
    source = method.source_method().to_canonical(stored, shape)
    expected: CanonicalWeight = source
    if isinstance(method, ConvertedLinearMethod):
        expected = method.target.quantize(source.dequantize(torch.float32), shape)
    weight = expected.dequantize(torch.float64)
    packed = bound.canonical().dequantize(torch.float64).cpu()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    errors = {}
    for label, magnitude in MAGNITUDES.items():
        if kind == "embedding":
            rows = torch.randint(0, weight.shape[0], (ROWS,), generator=generator)
            got, want = bound.run(rows.to(problem.device.torch_device)), weight[rows]
        else:
            x = torch.randn((ROWS, weight.shape[1]), generator=generator, dtype=torch.float32) * magnitude
            x = x.to(problem.dtype)
            got = bound.run(x.to(problem.device.torch_device), None)
            want = x.double() @ weight.t()
        errors[label] = relative_error(got.double().cpu(), want)
    tolerance = getattr(kernel, "tolerance", lambda _: TOLERANCES[problem.dtype])(problem)
    changed = 0.0
    if isinstance(method, ConvertedLinearMethod):
        changed = relative_error(weight, source.dequantize(torch.float64))
    exact = torch.equal(packed, weight)
    return LayerCheck(
        name,
        kind,
        method.describe(),
        kernel.name,
        kernel.numerics(problem),
        errors,
        tolerance,
        exact,
        changed,
    )


EXPERTS_MAGNITUDES = {"ordinary": 1.0, "large": 14.0}  # a gate times an up: 200 once more, in f16 too


def _check_experts(module: Experts, placements: tuple[Placement, ...]) -> LayerCheck:
    """All experts of a layer: every packed weight, and each expert's answers to rows routed to it alone."""
    bound = module.bound
    assert bound is not None
    problem, kernel = bound.problem, bound.selection.kernel
    packed, exact, changed = bound.canonical().products(), True, 0.0
    weights: dict[str, list[Tensor]] = {}
    for name, product in module.products_of().items():
        method = product.quant_method
        stored = _read_experts(product, [p for p in placements if p.module is product])
        originals = product.canonical(stored, method.source_method())
        decoded = zip(product.canonical(stored), originals, packed[name], strict=True)
        for expected, original, found in decoded:
            weight = expected.dequantize(torch.float64)
            exact &= torch.equal(found.dequantize(torch.float64).cpu(), weight)
            if isinstance(method, ConvertedLinearMethod):
                changed = max(changed, relative_error(weight, original.dequantize(torch.float64)))
            weights.setdefault(name, []).append(
                weight.float()
            )  # far closer than any tolerance, at half the size
    generator = torch.Generator().manual_seed(zlib.crc32(module.prefix.encode()))
    device, experts = problem.device.torch_device, torch.arange(problem.num_experts)
    ids = experts.repeat_interleave(ROWS).unsqueeze(-1)  # every expert has rows of its own
    errors = {}
    for label, magnitude in EXPERTS_MAGNITUDES.items():
        x = torch.randn((len(ids), problem.down.out_features), generator=generator) * magnitude
        x = x.to(problem.dtype)
        got = bound.run(x.to(device), ids.to(device), torch.ones(ids.shape, device=device), module.bias())
        want = _answers(weights, module, x.double().unflatten(0, (-1, ROWS)))
        errors[label] = relative_error(got.double().cpu(), want)
    described, numerics = module.quant_method.describe(), kernel.numerics(problem)
    tolerance = getattr(kernel, "tolerance", lambda p: 2 * TOLERANCES[p.dtype])(problem)
    return LayerCheck(
        module.prefix, "experts", described, kernel.name, numerics, errors, tolerance, exact, changed
    )


def _read_experts(product: Product, placements: list[Placement]) -> dict[str, Tensor]:
    """The product's stored tensors, [E, ...] each, from the file."""
    tensors: dict[str, Tensor] = {}
    written: dict[str, Written] = {}
    for spec in product.quant_method.weight_specs(product.shape.one):
        tensors[spec.name] = torch.zeros(place_experts(spec, product.shape)[0], dtype=spec.dtype)
        written[spec.name] = Written()
    for p in placements:
        write(tensors[p.param], p.slot, read_slot(p.tensor, p.slot), written[p.param])
    return tensors


def _answers(weights: dict[str, list[Tensor]], module: Experts, rows: Tensor) -> Tensor:
    """rows: [E, N, H] float64.  Returns each expert's answers, [E·N, H], by the plain formula."""
    bias, answers = module.bias(), []
    for expert, x in enumerate(rows):
        first = [x @ weights[name][expert].double().t() for name in weights if name != "down"]
        hidden = torch.cat(first, dim=-1)
        if bias.gate_up is not None:
            hidden = hidden + bias.gate_up[expert].double().cpu()
        y = module.activation(hidden) @ weights["down"][expert].double().t()
        answers.append(y if bias.down is None else y + bias.down[expert].double().cpu())
    return torch.cat(answers)
