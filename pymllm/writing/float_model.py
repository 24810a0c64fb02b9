"""The model in float32 on its way through the calibration text: one step at a time has weights and runs."""

# T calibration tokens, H hidden size, O out_features, I in_features

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pymllm.attention import AttnMetaDataBase, set_fetch_fn_for_attn_metadata
from pymllm.config import Execution
from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight
from pymllm.layers.held import weight_holders
from pymllm.loading.prepare import Prepared, build_on_meta
from pymllm.models.encoder import Encoder
from pymllm.moe.experts import Experts
from pymllm.parallel import Parallel
from pymllm.quantization.base import get_quantization_config
from pymllm.quantization.rules import RuledConfig
from pymllm.text.windows import Windows
from pymllm.writing.float_experts import FloatExperts
from pymllm.writing.layers import SourceLayer, Step, steps_of

FLOAT32 = Execution()


class FloatModel:
    """The model in plain floats, without data but for the step that is being calibrated.

    windows: token ids, each window a text of its own.  execution: how its modules run, in float32.
    hidden: [T, H], the input of the next step; None before the first one.
    """

    def __init__(self, prepared: Prepared, windows: Windows, execution: Execution = FLOAT32) -> None:
        plain = get_quantization_config("none").from_config({})
        plain.see_checkpoint(prepared.quant.stored)  # which layout experts have
        model = build_on_meta(prepared.config, RuledConfig(plain), execution, Parallel())
        if isinstance(model, Encoder):
            raise ConfigError(
                "a text runs through the blocks of decoders alone, and this model is an encoder",
                code="calibration",
                tensor=str(prepared.config.raw.get("model_type")),
                fix="Leave the calibration out: weights are then rounded by themselves.",
            )
        self.model, self.prepared = model, prepared
        self.modules = dict(model.named_modules())
        self.holders = dict(weight_holders(model))
        self.embedding_scale = model.embedding_scale
        lengths = [len(window) for window in windows]
        self.ids = torch.tensor([token for window in windows for token in window])
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
        self.hidden: Tensor | None = None
        # Steps outside of the blocks that blocks also run, until their weights are there.
        self.outside = (
            [step for step in steps_of(prepared) if self._stays(step)] if model.runs_outside else []
        )

    @contextlib.contextmanager
    def attending(self) -> Iterator[None]:
        """Let attention layers see the windows of the text, for the time of a `with` block."""
        set_fetch_fn_for_attn_metadata(lambda: self.metadata)
        try:
            yield
        finally:
            set_fetch_fn_for_attn_metadata(None)

    @contextlib.contextmanager
    def materialised(self, step: Step, read: Mapping[str, CanonicalWeight]) -> Iterator[FloatStep]:
        """Give the step's modules float32 parameters, which are freed at the end.

        read: the stored weights of the step's layers, by name.
        """
        while self.outside:
            other = self.outside.pop()
            if other.name != step.name:
                with self.materialised(other, {layer.name: layer.read() for layer in other.layers}):
                    pass
        experts: dict[str, FloatExperts] = {}
        meta: list[tuple[nn.Module, str, nn.Parameter]] = []
        weights: dict[str, Tensor] = {}
        params: dict[str, Tensor] = {}
        stored = {placement.tensor.name for layer in step.layers for placement in layer.placements}
        try:
            for unit in step.units:
                holder = self.holders.get(unit.name)
                if holder is None:
                    continue  # experts whose method is not that of the others: in floats, they are all together
                if isinstance(holder, Experts):
                    experts[unit.name] = FloatExperts(holder)
                    weights |= experts[unit.name].weights
                    continue
                module, parts = holder.module, tuple(holder.parts())
                for name, param in list(module._parameters.items()):
                    if param is not None:
                        meta.append((module, name, param))
                        zeros = nn.Parameter(torch.zeros(param.shape), requires_grad=False)
                        module.register_parameter(name, zeros)
                if parts and "weight" in module._parameters:
                    weight = module.get_parameter("weight").data
                    weight = weight.t() if getattr(module, "transposed", False) else weight
                    views = weight.split([p.shape.out_features for p in parts])
                    weights |= {part.name: view for part, view in zip(parts, views, strict=True)}
                for placement in unit.placements:
                    # Not scales of a KV cache either: calibration keeps keys and values in floats.
                    if placement.tensor.name not in stored and placement.param in module._parameters:
                        view = getattr(module, placement.param).data[placement.slot.target]
                        view.copy_(placement.tensor.read().reshape(view.shape))
                        params[placement.tensor.name] = view
                if not parts:
                    holder.finish()
            for layer in step.layers:
                if layer.name in weights:
                    weights[layer.name].copy_(layer.decode(read[layer.name]))
            yield FloatStep(self, step, weights, params, experts)
        finally:
            for made in experts.values():
                made.close()
            for module, name, param in meta if not self._stays(step) else ():
                module.register_parameter(name, param)

    def _stays(self, step: Step) -> bool:
        """Tell whether a step's weights stay once they are there, as other steps run them, too."""
        return self.model.runs_outside and step.block is None and not self.is_head(step.name)

    def is_head(self, name: str) -> bool:
        """Tell whether a step is the head alone: its output is the input of no step."""
        return self.modules.get(name) is self.model.lm_head


class FloatStep:
    """A step of a `FloatModel` while it has weights.

    weights: [O, I] float32 views, by layer name; a tied head has none, as its weight is the embedding's.
    params: the other tensors, by their names in the checkpoint.  experts: by module name.
    """

    def __init__(
        self,
        model: FloatModel,
        step: Step,
        weights: Mapping[str, Tensor],
        params: Mapping[str, Tensor],
        experts: Mapping[str, FloatExperts],
    ) -> None:
        self.model, self.step, self.weights, self.params = model, step, weights, params
        self.experts = experts
        self.module = model.modules[step.name]

    @property
    def is_head(self) -> bool:
        """True for the head: its output is the input of no step."""
        return self.model.hidden is not None and self.model.is_head(self.step.name)

    def run(self) -> Tensor:
        """Run the step on the calibration text.  Returns [T, H], the input of the next step."""
        model = self.model
        if self.is_head:
            assert model.hidden is not None
            return model.hidden
        with model.attending():
            return model.model.run_step(self.step.name, model.ids, model.positions, model.hidden)

    def calls_of(self, names: Sequence[str]) -> dict[str, tuple[Tensor, ...]]:
        """Run the step and keep what some modules are called with."""
        calls: dict[str, tuple[Tensor, ...]] = {}

        def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda module, args: calls.__setitem__(name, args)

        handles = [self.model.modules[name].register_forward_pre_hook(keep(name)) for name in names]
        try:
            self.run()
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def inputs_of(self, name: str) -> Tensor | None:
        """Record what a linear layer multiplies, [T, I].  Returns None if it is not called as one."""
        if self.step.block is None:
            return self.model.hidden if self.is_head else None
        call = self.calls_of([name]).get(name)
        return None if call is None else call[0].flatten(0, -2).clone()

    def inputs_by_layer(self, module: str, names: Sequence[str]) -> dict[str, Tensor | None]:
        """Record the inputs of a module's layers: the same for all, but each expert's are what is routed to it."""
        if module not in self.experts:
            return dict.fromkeys(names, self.inputs_of(module))
        experts = self.experts[module]
        experts.seen = {}
        self.run()
        seen, experts.seen = experts.seen, None
        return {name: seen.get(name) for name in names}

    def runner_of(self, name: str) -> Callable[[], Tensor]:
        """Make a function that calls a module as the step calls it, however often."""
        args = self.calls_of([name])[name]
        module = self.model.modules[name]

        def run() -> Tensor:
            with self.model.attending():
                return module(*args)

        return run

    def in_order(self, layers: Mapping[str, SourceLayer]) -> list[tuple[str, list[str]]]:
        """List the modules of the layers in the order in which they run, each with the names of its layers."""
        found: list[tuple[str, list[str]]] = []
        rounds: list[tuple[str, list[str]]] = []  # of experts: gate and up of all of them, then down
        for unit in self.step.units:
            holder = self.model.holders.get(unit.name)
            if unit.name in self.experts:
                rounds += [(unit.name, names) for names in self.experts[unit.name].rounds]
            elif holder is not None:
                names = [part.name for part in holder.parts() if part.name in layers]
                found += [(unit.name, names)] if names else []
        # Experts come last: shared ones read the same input and do not depend on them.
        ordered = [*found, *rounds]
        assert {name for _, names in ordered for name in names} == set(layers)
        return ordered
