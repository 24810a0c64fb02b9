"""Transformers' class with our layers in it, as the engine, the loader and the plan know a model."""

# T tokens, H hidden size, N rows, V vocabulary

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.config import current_execution
from pymllm.errors import ConfigError
from pymllm.layers.held import weight_holders
from pymllm.models.generic import attention
from pymllm.models.generic.attention import PagedLayers
from pymllm.models.generic.classes import GenericConfig, build_on_meta, takes
from pymllm.models.generic.division import Division
from pymllm.models.generic.experts import RoutedExperts, find_experts, is_stored_so
from pymllm.models.generic.fast import put_fast
from pymllm.models.generic.layers import make_embedding, make_head, make_linear, replace_module
from pymllm.models.generic.probe import FUTURE, Probe, probe, run_arguments
from pymllm.models.generic.recurrences import Recurrences, put_recurrences, take_recurrences
from pymllm.models.generic.request_cache import RequestCaches, find_restart
from pymllm.models.generic.stepwise import Blocks
from pymllm.models.generic.unneeded import skip_reason
from pymllm.models.generic.unreached import find_unreached, notes_of
from pymllm.models.language_model import LanguageModel
from pymllm.modules.foreign_experts import ForeignExperts
from pymllm.parallel import Parallel
from pymllm.quantization.base import QuantizationConfig, StoredTensor
from pymllm.weights.report import Skip


class GenericModel(LanguageModel):
    """A decoder of transformers.

    why_alone: why the requests of a step cannot be run side by side; None: they are.
    fast: whether products, norms and gated MLPs of ours take the places of the class's modules that equal them; over
    several ranks they do not.
    """

    config: GenericConfig
    inner: Any
    base_name: str

    runs_outside = True
    blocks: Blocks

    def __init__(
        self, config: GenericConfig, quant_config: QuantizationConfig | None = None, fast: bool = True
    ) -> None:
        super().__init__()
        self.config = config
        execution = current_execution()
        dtype = torch.get_default_dtype() if execution is None else execution.dtype
        attention.register()
        inner: Any = build_on_meta(config, dtype, attention.PROBED)
        self._tied = dict(inner.all_tied_weights_keys)
        _keep_float32(inner, dtype)
        _own_buffers(inner)
        head = inner.get_output_embeddings()
        self._head_name = next((name for name, module in inner.named_modules() if module is head), "")
        experts = find_experts(config.skeleton)
        put_experts(inner, experts, quant_config)
        put_recurrences(inner)
        found = probe(inner, config.size("max_position_embeddings"))
        reason = (
            found.why_not if found.why_not is not None and FUTURE in found.why_not else _why_encoder(inner)
        )
        if reason is not None:
            raise ConfigError(
                f"transformers' {config.architecture} is no decoder with this config.json: {reason}",
                code="model-type",
                file="config.json",
                tensor="is_decoder",
                expected="attention to what came before, and no more",
                found="an encoder",
            )
        self.why_alone = found.why_not
        if found.why_not is not None:
            _set_attention(inner, "eager")
            take_recurrences(inner)
            caches = RequestCaches(inner.config)
            caches.measure(inner.get_submodule(found.base), dtype)
            self.restart_length = find_restart(inner)
        division = Division(inner, found)
        self.why_not_fused: list[str] = []
        if fast and division.size == 1 and found.why_not is None:
            tied = {*self._tied, *self._tied.values()}
            self.why_not_fused = put_fast(inner, found, tied, dtype, quant_config)
            division.try_out = self._why_not_divided
            calls = found.attention
        self._put_layers(inner, found, division, quant_config)
        if division.try_out is None:
            calls = division.own_calls(inner, config)
        if found.why_not is None:
            _set_attention(inner, attention.PAGED)
            for name, called in found.attention.items():
                layer = inner.get_submodule(name)
                attention.add_attention(layer, name, calls.get(name, called), called, quant_config)
        # A tied head is packed after the table that it runs.
        last = self._head_name.partition(".")[0]
        if last in inner._modules:
            inner._modules[last] = inner._modules.pop(last)
        self.unreached = find_unreached(inner, experts)
        self._left = notes_of(inner, self.unreached)
        self._experts = [(n, m) for n, m in inner.named_modules() if isinstance(m, RoutedExperts)]
        turns = [module for module in inner.modules() if isinstance(module, (PagedLayers, Recurrences))]
        self._in_turns = [layers for layers in turns if len(layers) > 1]
        self._device = torch.device("cpu")
        # Its modules and parameters are ours, under their own names.
        self._modules, self._parameters, self._buffers = inner._modules, inner._parameters, inner._buffers
        self.__dict__["inner"], self.__dict__["base_name"] = inner, found.base
        self.__dict__["blocks"] = Blocks(inner.get_submodule(found.base), found.base)
        self.division = division
        if found.why_not is not None:
            self.request_caches = caches

    def _why_not_divided(self) -> str | None:
        """Try the smallest number of ranks that can be, without data.  Returns what stands in the way, or None."""
        with torch.device("meta"), Parallel():
            return GenericModel(self.config, fast=False).division.why_not

    def _put_layers(
        self, inner: Any, found: Probe, division: Division, quant_config: QuantizationConfig | None
    ) -> None:
        """Put our layers in the places of what the class's forward calls as they do, the embedding before the head."""
        modules = dict(inner.named_modules())
        for name, module in modules.items():
            if name == self._head_name or (name not in found.inputs and found.why_not is None):
                continue
            made: Any = division.make_linear(module, name, quant_config)
            made = (
                made or make_embedding(module, name, quant_config) or make_linear(module, name, quant_config)
            )
            if made is not None:
                replace_module(inner, name, made)
        head = modules.get(self._head_name)
        source = self._tied.get(f"{self._head_name}.weight", "").rpartition(".")[0]
        table: Any = inner.get_submodule(source) if source else None
        made = make_head(head, self._head_name, table, quant_config)
        if made is not None:
            replace_module(inner, self._head_name, made)

    @property
    def lm_head(self) -> Any:  # type: ignore[override]
        """The layer that makes logits."""
        return self.inner.get_submodule(self._head_name)

    @property
    def definition(self) -> str:
        return f"transformers' {self.config.architecture}"

    @property
    def notes(self) -> list[str]:
        """The remarks of a plan on how the class's model runs."""
        if self.why_alone is None:
            return [*self.why_not_fused, *self._left]
        return [f"requests run one after another over transformers' own cache: {self.why_alone}", *self._left]

    @property
    def why_not_repeated(self) -> str | None:
        return None if self.why_alone is None else "each request has a cache of its own"

    @property
    def keys_depend_on_length(self) -> bool:
        """True where a request runs alone: its prompt is read whole, as transformers reads it."""
        return self.why_alone is not None

    def skip_reason(self, tensor: str, stored: Mapping[str, StoredTensor]) -> Skip | str | None:
        for path, experts in self._experts:
            said = experts.why_not_needed(tensor.removeprefix(f"{path}."))
            if said is not None and tensor.startswith(f"{path}."):
                return said
        return skip_reason(self.inner, tensor, self.config.wrapper is not None)

    @property
    def embedding_scale(self) -> float:  # type: ignore[override]
        return float(getattr(self.inner.get_input_embeddings(), "embed_scale", 1.0))

    def block_of(self, name: str) -> str | None:
        return self.blocks.block_of(name)

    def run_step(self, name: str, ids: Tensor, positions: Tensor, hidden: Tensor | None) -> Tensor:
        if self.why_alone is not None:
            raise ConfigError(
                "calibration runs texts side by side, and this model runs them one after another",
                code="calibration",
                found=self.why_alone,
                fix="Quantise without --calibrate.",
            )
        if hidden is None:
            return self.blocks.enter(ids, positions)
        block, last = self.block_of(name), self._last_step()
        if block is not None:
            hidden = self.blocks.run(name, ids, positions, hidden)
        elif not self.blocks.begun:
            hidden = self.blocks.enter(ids, positions)
        return self.blocks.leave(ids, positions, hidden) if name == last else hidden

    def _last_step(self) -> str:
        """Return the last block or module before the head that has weights."""
        names = [name for name, _ in weight_holders(self) if name not in (self._head_name, "division")]
        return self.block_of(names[-1]) or names[-1]

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        base = self.inner.get_submodule(self.base_name)
        self._start_step(ids.device)
        if self.why_alone is not None:
            return self.request_caches.run(base, ids, positions)
        return base(**run_arguments(base, ids[None], positions[None]))[0][0]

    def _start_step(self, device: torch.device) -> None:
        """Have computed buffers on the step's device, and modules with several layers begin with the first."""
        if self._device != device:
            self._device = device
            for module in self.inner.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = buffer.to(device)
        for layers in self._in_turns:
            layers.restart()

    def compute_logits(self, hidden: Tensor, gather_all: bool = True) -> Tensor | None:
        """Apply the class's own forward after its inner model: the head, and what it does to logits."""
        return run_head(self.inner, self.base_name, hidden, self._no_ids(hidden)).float()

    def _no_ids(self, hidden: Tensor) -> Tensor:
        """Return ids of as many tokens as `hidden` has, [1, N]: the same zero, so that no step has to make it."""
        zeros = vars(self).setdefault("zeros", {})
        if hidden.device not in zeros:
            zeros[hidden.device] = hidden.new_zeros((1, 1), dtype=torch.int64)
        return zeros[hidden.device].expand(1, len(hidden))


def run_head(model: Any, base_name: str, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
    """Run what a class's forward does after its inner model.  hidden: [N, H].  Returns logits [N, V].

    base_name: the inner model's.  ids: [1, N], for a forward that looks at their number; None: they are made.
    """
    base = model.get_submodule(base_name)
    output = _Hidden(hidden[None])
    base.forward = lambda *_, **__: output
    if ids is None:
        ids = hidden.new_zeros((1, len(hidden)), dtype=torch.int64)
    try:
        given = {"input_ids": ids, "use_cache": False}
        return model(**{name: value for name, value in given.items() if takes(model, name)}).logits[0]
    finally:
        del base.forward


class _Hidden(tuple):  # type: ignore[type-arg]
    """Hidden states as the output of a model: by place and by name; what else is asked for is None."""

    def __new__(cls, hidden: Tensor) -> _Hidden:
        return super().__new__(cls, (hidden,))

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _why_encoder(inner: Any) -> str | None:
    """Return why a class is an encoder with its config: it says itself, as it is made, that is_decoder is to be set."""
    if getattr(inner.config, "is_decoder", True):
        return None
    asks = "is_decoder=True" in inspect.getsource(type(inner).__init__)
    return "is_decoder is false, so its attention sees the whole text" if asks else None


def _set_attention(inner: Any, name: str) -> None:
    """Have the class's modules attend by another of transformers' functions."""
    for module in inner.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = name


def _keep_float32(inner: Any, dtype: torch.dtype) -> None:
    """Give parameters that the class keeps in float32 that dtype."""
    names = {*(inner._keep_in_fp32_modules_strict or ())}
    if dtype is torch.float16:
        names |= {*(inner._keep_in_fp32_modules or ())}
    for path, module in inner.named_modules():
        for name, param in module._parameters.items():
            full = f"{path}.{name}"
            if param is not None and any(re.search(rf"(^|\.){re.escape(n)}(\.|$)", full) for n in names):
                module._parameters[name] = nn.Parameter(param.float(), requires_grad=False)


def _own_buffers(inner: nn.Module) -> None:
    """Make parameters of the buffers that checkpoints hold, so that each of them must be there."""
    for module in inner.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                del module._buffers[name]
                module._parameters[name] = nn.Parameter(buffer, requires_grad=False)


def put_experts(inner: Any, facts: Mapping[str, Any], quant_config: QuantizationConfig | None) -> None:
    """Put our experts in the places of modules that stack them, where the checkpoint stores what ours read."""
    for name, found in facts.items():
        if isinstance(found, ForeignExperts) and is_stored_so(name, found, quant_config):
            replace_module(inner, name, RoutedExperts(found, name, quant_config))
