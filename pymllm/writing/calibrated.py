"""Steps made with calibration text: the model runs over it in float32, a block at a time, while it is quantised.

A block is decoded, its layers are quantised in the order in which they run, and the decoded new weight of each one
takes the place of the old one, so that those after it are fitted to what will really reach them. What then leaves the
block is the input of the next one; it is all that is kept of the blocks before.
"""

# T calibration tokens, H hidden size, O out_features, I in_features

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.attention import AttnMetaDataBase, set_fetch_fn_for_attn_metadata
from pymllm.config import Execution
from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight, IntWeight, relative_error
from pymllm.layers.held import WeightHolder
from pymllm.layers.layernorm import RMSNorm
from pymllm.layers.weighted import WeightedLayer
from pymllm.loading.prepare import Prepared, build_on_meta
from pymllm.moe.experts import Experts
from pymllm.parallel import Parallel
from pymllm.quantization.base import get_quantization_config
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.rounding.awq import search_scales
from pymllm.quantization.rounding.calibrated import (
    InputStatistics,
    needs_inputs,
    quantize_calibrated,
    without_static,
)
from pymllm.quantization.rules import RuledConfig
from pymllm.writing.encoding import encode, fitted
from pymllm.writing.float_experts import FloatExperts
from pymllm.writing.layers import SourceLayer, Step

ALGORITHMS = ("awq", "gptq")


@dataclass(frozen=True)
class Calibration:
    """What to calibrate with.

    windows: token ids, each a text of its own.  algorithm: "awq" or "gptq".  act_order: gptq's order of rounding.
    source: what the text is, for the model card.
    """

    windows: tuple[tuple[int, ...], ...]
    algorithm: str
    act_order: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ConfigError(
                "unknown calibration algorithm",
                code="calibration",
                expected=" or ".join(ALGORITHMS),
                found=self.algorithm,
            )
        if self.act_order and self.algorithm != "gptq":
            raise ConfigError("act order belongs to gptq", code="calibration", found=self.algorithm)

    def describe(self) -> str:
        order = ", in act order" if self.act_order else ""
        tokens = sum(map(len, self.windows))
        return f"{self.algorithm}{order}, on {tokens} tokens of {self.source or 'text'}"


@dataclass(frozen=True)
class MadeLayer:
    """A quantised layer.  error: relative distance of the weight to what it was (its input scales folded in)."""

    layer: SourceLayer
    weight: CanonicalWeight
    error: float


class CalibratedModel:
    """The model in float32, of which one step at a time has weights, and the calibration text's way through it."""

    def __init__(self, prepared: Prepared, calibration: Calibration, scale_dtype: torch.dtype) -> None:
        plain = RuledConfig(get_quantization_config("none").from_config({}))
        model = build_on_meta(prepared.config, plain, Execution(), Parallel())
        self.modules = dict(model.named_modules())
        self.embedding_scale = model.model.embedding_scale
        self.prepared, self.calibration, self.scale_dtype = prepared, calibration, scale_dtype
        lengths = [len(window) for window in calibration.windows]
        self.ids = torch.tensor([token for window in calibration.windows for token in window])
        self.positions = torch.cat([torch.arange(length) for length in lengths])
        starts = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
        bounds = torch.tensor(starts, dtype=torch.int32)
        self.metadata = AttnMetaDataBase(
            is_prefill=True,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=max(lengths),
            max_seqlen_k=max(lengths),
            context_lens=bounds.diff(),
            query_starts=tuple(starts),
            lengths=tuple(lengths),
        )
        self.hidden: Tensor | None = None  # [T, H], what the next step gets
        self.unreached: list[str] = []  # layers that no input was recorded for

    @torch.no_grad()
    def make(self, step: Step) -> tuple[list[MadeLayer], dict[str, Tensor]]:
        """Quantise a step's layers and run it.  Returns them, and the copied tensors that scales were folded into."""
        read = {layer.name: layer.read() for layer in step.layers}
        changed: dict[str, Tensor] = {}
        with self._materialised(step, read) as block:
            made = list(self._quantise(step, block, read, changed))
            self.hidden = block.run()
        return made, changed

    @contextlib.contextmanager
    def _materialised(self, step: Step, read: Mapping[str, CanonicalWeight]) -> Iterator[_Block]:
        """The step's modules with float32 parameters, which are freed at the end."""
        units = [
            unit
            for unit in self.prepared.units
            if unit.name == step.name or unit.name.startswith(step.name + ".")
        ]
        experts: dict[str, FloatExperts] = {}
        meta: list[tuple[nn.Module, str, nn.Parameter]] = []
        weights: dict[str, Tensor] = {}
        params: dict[str, Tensor] = {}
        stored = {placement.tensor.name for layer in step.layers for placement in layer.placements}
        try:
            for unit in units:
                module = self.modules[unit.name]
                if isinstance(module, Experts):
                    experts[unit.name] = FloatExperts(module)
                    weights |= experts[unit.name].weights
                    continue
                for name, param in list(module._parameters.items()):
                    if param is not None:
                        meta.append((module, name, param))
                        module.register_parameter(
                            name, nn.Parameter(torch.zeros(param.shape), requires_grad=False)
                        )
                if isinstance(module, WeightedLayer) and "weight" in module._parameters:
                    weights |= _views(module)
                for placement in unit.placements:
                    # Not scales of a KV cache either: calibration keeps keys and values in floats.
                    if placement.tensor.name not in stored and placement.param in module._parameters:
                        view = getattr(module, placement.param).data[placement.slot.target]
                        view.copy_(placement.tensor.read().reshape(view.shape))
                        params[placement.tensor.name] = view
                if not isinstance(module, WeightedLayer) and isinstance(module, WeightHolder):
                    module.finish()
            for layer in step.layers:
                if layer.name in weights:
                    weights[layer.name].copy_(layer.decode(read[layer.name]))
            yield _Block(self, step, weights, params, experts)
        finally:
            for made in experts.values():
                made.close()
            for module, name, param in meta:
                module.register_parameter(name, param)

    def _quantise(
        self, step: Step, block: _Block, read: Mapping[str, CanonicalWeight], changed: dict[str, Tensor]
    ) -> Iterator[MadeLayer]:
        layers = {layer.name: layer for layer in step.layers}
        if self.calibration.algorithm == "awq":
            for group in block.scale_groups(layers):
                changed |= self._fold(group, layers, block)
        for module_name, names in block.in_order(layers):
            inputs: Mapping[str, Tensor | None] = {}
            if any(layers[name].target is not None for name in names):
                inputs = block.inputs_by_layer(module_name, names)
            for name in names:
                yield self._quantised(layers[name], block.weights.get(name), inputs.get(name), read[name])

    def _quantised(
        self, layer: SourceLayer, floats: Tensor | None, inputs: Tensor | None, stored: CanonicalWeight
    ) -> MadeLayer:
        if layer.target is None:
            return MadeLayer(layer, stored, 0.0)
        if floats is None:  # a module of a kind that keeps its weights in its own way
            floats = layer.decode(stored)
        before = floats.clone()
        if inputs is None:
            self.unreached.append(layer.name)
            if needs_inputs(layer.target):
                raise ConfigError(
                    "no calibration input reached this layer, which needs them for its activation scales",
                    code="calibration-values",
                    tensor=layer.name,
                    fix="Give it activations=token.",
                )
            weight = encode(layer.target, before, layer.shape, self.scale_dtype)
        else:
            weight = self._round(layer, before, inputs)
        floats.copy_(weight.dequantize(torch.float32))
        return MadeLayer(layer, weight, relative_error(floats, before))

    def _round(self, layer: SourceLayer, weight: Tensor, inputs: Tensor) -> CanonicalWeight:
        assert layer.target is not None
        if not bool(torch.isfinite(inputs).all()):
            raise ConfigError(
                "calibration inputs of this layer are not finite numbers",
                code="calibration-values",
                tensor=layer.name,
                fix="Check the model on this text: `pymllm verify MODEL --text FILE`.",
            )
        gptq = self.calibration.algorithm == "gptq"
        statistics = InputStatistics(weight.shape[1], gram=gptq and _is_integer(layer.target, layer))
        statistics.add(inputs)
        made = quantize_calibrated(
            layer.target,
            weight,
            layer.shape,
            statistics,
            algorithm="gptq" if gptq else "clip",
            act_order=self.calibration.act_order,
            scale_dtype=self.scale_dtype,
            inputs=inputs,
        )
        return fitted(made, weight, self.scale_dtype)

    def _fold(
        self, group: _ScaleGroup, layers: Mapping[str, SourceLayer], block: _Block
    ) -> dict[str, Tensor]:
        """Search the input scales of some layers and fold them into what makes their inputs."""
        targets = [layers[name].target for name in group.names]
        weights = [block.weights[name] for name in group.names]

        def rounding(target: LinearMethodBase, layer: SourceLayer) -> Callable[[Tensor], Tensor]:
            plain = without_static(target)
            return lambda weight: encode(plain, weight, layer.shape, self.scale_dtype).dequantize(
                torch.float32
            )

        rounded = [
            rounding(target, layers[name])
            for target, name in zip(targets, group.names, strict=True)
            if target is not None
        ]
        inputs = block.inputs_of(group.reader)
        if inputs is None:
            return {}
        sizes = [_group_size(layers[name]) for name in group.names]
        scales = search_scales(weights, inputs, block.runner_of(group.run), rounded, min(sizes))
        return block.fold(group, scales)


@dataclass(frozen=True)
class _ScaleGroup:
    """Layers that share an input which scales can be divided out of.

    names: of the layers.  reader: the module that they are.  run: the module whose output is to be kept.
    norm: the tensor of the norm that makes the input, or layer: the layer whose outputs are multiplied into it.
    """

    names: tuple[str, ...]
    reader: str
    run: str
    norm: str | None = None
    layer: str | None = None


class _Block:
    """A step with its weights.  weights: [O, I] float32 views by layer name; params: of the other tensors."""

    def __init__(
        self,
        owner: CalibratedModel,
        step: Step,
        weights: Mapping[str, Tensor],
        params: Mapping[str, Tensor],
        experts: Mapping[str, FloatExperts],
    ) -> None:
        self.owner, self.step, self.weights, self.params = owner, step, weights, params
        self.experts = experts
        self.module = owner.modules[step.name]

    def run(self) -> Tensor:
        """The step's output on the calibration text, [T, H]."""
        owner, module = self.owner, self.module
        if owner.hidden is None:
            return module(owner.ids) * owner.embedding_scale
        if self.step.block is None:
            # The head's output is nobody's input.
            return module(owner.hidden) if isinstance(module, RMSNorm) else owner.hidden
        set_fetch_fn_for_attn_metadata(lambda: owner.metadata)
        try:
            hidden, residual = module(owner.positions, owner.hidden, None)
        finally:
            set_fetch_fn_for_attn_metadata(None)
        return hidden + residual

    def calls_of(self, names: Sequence[str]) -> dict[str, tuple[Tensor, ...]]:
        """What some modules are called with when the step runs."""
        calls: dict[str, tuple[Tensor, ...]] = {}

        def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda module, args: calls.__setitem__(name, args)

        handles = [self.owner.modules[name].register_forward_pre_hook(keep(name)) for name in names]
        try:
            self.run()
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def inputs_of(self, name: str) -> Tensor | None:
        """[T, I], what a linear layer multiplies; None if it is not called as one."""
        if self.step.block is None:
            is_head = isinstance(self.module, WeightedLayer) and self.owner.hidden is not None
            return self.owner.hidden if is_head else None
        call = self.calls_of([name]).get(name)
        return None if call is None else call[0].flatten(0, -2).clone()

    def inputs_by_layer(self, module: str, names: Sequence[str]) -> dict[str, Tensor | None]:
        """The inputs of a module's layers: the same for all, but for experts, which see what is routed to them."""
        if module not in self.experts:
            return dict.fromkeys(names, self.inputs_of(module))
        experts = self.experts[module]
        experts.seen = {}
        self.run()
        seen, experts.seen = experts.seen, None
        return {name: seen.get(name) for name in names}

    def runner_of(self, name: str) -> Callable[[], Tensor]:
        """Call a module again and again as the step calls it."""
        args = self.calls_of([name])[name]
        module, metadata = self.owner.modules[name], self.owner.metadata

        def run() -> Tensor:
            set_fetch_fn_for_attn_metadata(lambda: metadata)
            try:
                return module(*args)
            finally:
                set_fetch_fn_for_attn_metadata(None)

        return run

    def in_order(self, layers: Mapping[str, SourceLayer]) -> list[tuple[str, list[str]]]:
        """The modules of the layers, in the order in which they run, each with its layers."""
        found: dict[str, list[str]] = {}
        rounds: list[tuple[str, list[str]]] = []  # of experts: gate and up of all of them, then down
        for name, module in self.owner.modules.items():
            if name in self.experts:
                rounds += [(name, part) for part in self.experts[name].rounds]
            if isinstance(module, WeightedLayer):
                parts = [p for p in (*module.shape.parts, module.prefix) if p in layers]
                if parts and (name == self.step.name or name.startswith(f"{self.step.name}.")):
                    found[name] = list(dict.fromkeys(parts))
        # Experts come last: shared ones, and those of other groups, read the same input and do not depend on them.
        ordered = [*found.items(), *rounds]
        assert {name for _, names in ordered for name in names} == set(layers)
        return ordered

    def scale_groups(self, layers: Mapping[str, SourceLayer]) -> list[_ScaleGroup]:
        """Where scales can be folded exactly: behind a norm that only these layers read, and between up and down."""
        groups = []
        for block_name, block in self.module.named_children():
            path = f"{self.step.name}.{block_name}"
            norm = getattr(self.module, "read_by", {}).get(block_name)
            if norm is not None:
                for reader in getattr(block, "reads_input", ()):
                    names = getattr(block, reader).shape.parts
                    norm_weight = f"{self.step.name}.{norm}.weight"
                    groups.append(_ScaleGroup(names, f"{path}.{reader}", path, norm=norm_weight))
            for reader, (maker, part) in getattr(block, "factors", {}).items():
                makers, names = getattr(block, maker).shape.parts, getattr(block, reader).shape.parts
                if part < len(makers):  # else its rows have no name of their own
                    reader_path = f"{path}.{reader}"
                    groups.append(_ScaleGroup(names, reader_path, reader_path, layer=makers[part]))
        return [group for group in groups if self._foldable(group, layers)]

    def _foldable(self, group: _ScaleGroup, layers: Mapping[str, SourceLayer]) -> bool:
        """Whether all that would change is to be quantised anyway, or is a norm."""
        changed = [*group.names, *([group.layer] if group.layer else [])]
        if not all(name in layers and layers[name].target is not None for name in changed):
            return False
        if not all(_is_integer(layers[name].target, layers[name]) for name in group.names):
            return False
        norm = None if group.norm is None else self.owner.modules[group.norm.removesuffix(".weight")]
        return norm is None or (hasattr(norm, "weight_offset") and group.norm in self.params)

    def fold(self, group: _ScaleGroup, scales: Tensor) -> dict[str, Tensor]:
        """Divide the input by `scales` [I] at its source and multiply the layers' weights; the changed tensors.

        A norm is rounded to the dtype that it is stored in, and the layers get what it really was divided by.
        """
        changed = {}
        if group.norm is not None:
            norm = self.params[group.norm]
            (info,) = (tensor for tensor in self.step.copied if tensor.name == group.norm)
            added: Any = self.owner.modules[group.norm.removesuffix(".weight")].weight_offset
            stored = (norm / scales - added).to(info.dtype)
            divided = stored.float() + added
            usable = (divided != 0) & torch.isfinite(divided) & (norm != 0)
            scales = torch.where(usable, norm / divided, 1.0)
            stored = torch.where(usable, stored, (norm - added).to(info.dtype))
            norm.copy_(stored.float() + added)
            changed[group.norm] = stored
        else:
            assert group.layer is not None
            self.weights[group.layer].div_(scales.unsqueeze(1))
            bias = self.params.get(f"{group.layer}.bias")
            if bias is not None:
                (info,) = (tensor for tensor in self.step.copied if tensor.name == f"{group.layer}.bias")
                changed[f"{group.layer}.bias"] = (bias / scales).to(info.dtype)
                bias.copy_(changed[f"{group.layer}.bias"])
        for name in group.names:
            self.weights[name].mul_(scales)
        return changed


def _views(module: WeightedLayer) -> dict[str, Tensor]:
    """Return the weight of each part, by the names under which rules know them."""
    weight, names = module.get_parameter("weight").data, module.names()
    if len(names) == 1:
        return {names[0]: weight}
    return dict(zip(names, weight.split([span.size for span in module.shape.outputs]), strict=True))


def _is_integer(target: LinearMethodBase | None, layer: SourceLayer) -> bool:
    """Whether a method makes integer codes with integer zero points: what scales and Hessians help."""
    if target is None:
        return False
    meta = torch.empty((layer.shape.out_features, layer.shape.in_features), device="meta")
    made = without_static(target).quantize(meta, layer.shape)
    return isinstance(made, IntWeight) and made.offsets is None


def _group_size(layer: SourceLayer) -> int:
    meta = torch.empty((layer.shape.out_features, layer.shape.in_features), device="meta")
    assert layer.target is not None
    made = without_static(layer.target).quantize(meta, layer.shape)
    assert isinstance(made, IntWeight)
    return made.group_size
