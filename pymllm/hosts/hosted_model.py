"""A model that transformers has built, with our layers in it, as the loader knows a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from pymllm.errors import ConfigError
from pymllm.layers.held import WeightHolder
from pymllm.models.generic.classes import GenericConfig, class_called
from pymllm.models.generic.experts import RoutedExperts, find_experts
from pymllm.models.generic.layers import make_embedding, make_head, make_linear, replace_module
from pymllm.models.generic.model import put_experts
from pymllm.models.generic.unneeded import skip_reason
from pymllm.models.generic.unreached import find_unreached
from pymllm.models.language_model import LanguageModel
from pymllm.quantization.base import QuantizationConfig, StoredTensor
from pymllm.quantization.kv_cache import UnquantizedKVCacheMethod, skip_kv_tensor
from pymllm.weights.report import Skip


class HostedModel(LanguageModel):
    """A decoder of transformers' that stays the host's: its linear layers, embeddings, head and experts are ours.

    Attention, cache and forward are transformers' own.  inner: the host's model, which is changed in place.
    """

    config: GenericConfig

    def __init__(self, config: GenericConfig, inner: Any, quant_config: QuantizationConfig) -> None:
        super().__init__()
        self._refuse_other_class(config, inner)
        self.config = config
        self._own_buffers = _own_buffers(inner)
        experts = find_experts(config.skeleton)
        put_experts(inner, experts, quant_config)
        head = inner.get_output_embeddings()
        modules = dict(inner.named_modules())
        self._head_name = next((name for name, module in modules.items() if module is head), "")
        for name, module in modules.items():
            if module is head:
                continue
            made: Any = make_embedding(module, name, quant_config) or make_linear(module, name, quant_config)
            if made is not None:
                replace_module(inner, name, made)
        tied = config.skeleton.all_tied_weights_keys
        source = tied.get(f"{self._head_name}.weight", "").rpartition(".")[0]
        table: Any = inner.get_submodule(source) if source else None
        made = make_head(head, self._head_name, table, quant_config, fp32_logits=False)
        if made is not None:
            replace_module(inner, self._head_name, made)
            # A tied head is packed after the table that it runs.
            last = self._head_name.partition(".")[0]
            inner._modules[last] = inner._modules.pop(last)
        self.unreached = find_unreached(inner, experts)
        self._experts = [(n, m) for n, m in inner.named_modules() if isinstance(m, RoutedExperts)]
        # Its modules and parameters are the host's, under their own names.
        self._modules, self._parameters, self._buffers = inner._modules, inner._parameters, inner._buffers
        self.__dict__["inner"] = inner

    @staticmethod
    def _refuse_other_class(config: GenericConfig, inner: Any) -> None:
        wrapped = config.wrapper is not None
        if wrapped or not isinstance(inner, class_called(config.architecture)):
            raise ConfigError(
                f"transformers builds a {type(inner).__name__} here, and only decoders of text can be hosted",
                code="model-type",
                file="config.json",
                tensor="architectures",
                expected="a config.json of a text decoder, and AutoModelForCausalLM",
                found=f"{config.raw.get('model_type')!r}{', inside a wrapper' if wrapped else ''}",
                fix="Run the checkpoint with pymllm.LLM, or quantise the model in place: pymllm.quantize_model.",
            )

    @property
    def lm_head(self) -> Any:  # type: ignore[override]
        """The layer that makes logits."""
        return self.__dict__["inner"].get_submodule(self._head_name)

    @property
    def definition(self) -> str:
        return f"transformers' {self.config.architecture}"

    def skip_reason(self, tensor: str, stored: Mapping[str, StoredTensor]) -> Skip | str | None:
        for path, experts in self._experts:
            said = experts.why_not_needed(tensor.removeprefix(f"{path}."))
            if said is not None and tensor.startswith(f"{path}."):
                return said
        segments = tensor.split(".")
        for start in range(max(len(segments) - 3, 1), len(segments)):
            module, name = ".".join(segments[:start]), ".".join(segments[start:])
            scale = skip_kv_tensor(UnquantizedKVCacheMethod(), name, f"{module}.", stored)
            if scale is not None:
                return scale
        return skip_reason(self.config.skeleton, tensor, wrapped=False)

    def put_aside(self) -> Iterator[tuple[str, nn.Module]]:
        """Take our layers out of the host's model, so that its loader finds nothing to fill there.  Yields each."""
        inner: Any = self.__dict__["inner"]
        outer: tuple[str, ...] = ()
        for name, module in list(inner.named_modules()):
            if isinstance(module, (WeightHolder, RoutedExperts)) and not name.startswith(outer or "\0"):
                outer = (*outer, f"{name}.")
                replace_module(inner, name, nn.Module())
                yield name, module

    def restore_buffers(self) -> None:
        """Make buffers again of those that were parameters while they were loaded."""
        for module, name in self._own_buffers:
            module._buffers[name] = module._parameters.pop(name).data  # type: ignore[union-attr]


def _own_buffers(inner: nn.Module) -> list[tuple[nn.Module, str]]:
    """Make parameters of the buffers that checkpoints hold, so that each of them must be there.  Returns them."""
    found = []
    for module in inner.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and name not in module._non_persistent_buffers_set:
                del module._buffers[name]
                module._parameters[name] = nn.Parameter(buffer, requires_grad=False)
                found.append((module, name))
    return found
