"""The quantisation "pymllm" of vLLM: `vllm serve MODEL --quantization pymllm`.

The entry point `vllm.general_plugins` calls `register` wherever vLLM starts a process. vLLM's model, loader, attention
and experts stay its own; linear layers, embeddings and heads that the checkpoint's config or your rules quantise have
our methods. Rules come as `hf_overrides={"quantization_config": {"quant_method": "pymllm", "quant": {...}}}`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from pymllm.errors import ConfigError, RuleError, choices, nearest
from pymllm.hosts.vllm_layers import HostedLinearMethod, refuse_tied
from pymllm.loading.prepare import hoist_settings, read_quantization_config
from pymllm.loading.side_settings import method_name
from pymllm.loading.stored import check_skipped
from pymllm.models.generic.layers import ROUTERS
from pymllm.quantization.base import QuantizationConfig as OurConfig
from pymllm.quantization.base import get_quantization_config
from pymllm.quantization.formats.none import UnquantizedLinearMethod as PlainMethod
from pymllm.quantization.method import LinearMethodBase as OurMethod
from pymllm.quantization.method import StoredTensor
from pymllm.quantization.rules import RuledConfig, read_rules
from pymllm.quantization.storage.settings import ROOT, Settings
from pymllm.weights.loader import with_stack_members
from pymllm.weights.module_names import ModuleNames
from pymllm.weights.opening import open_checkpoint, resolve_model_path
from pymllm.weights.report import Skip

NAME = "pymllm"
OPTIONS = ("quant", "compute", "kernels")
ADDED = ("total_num_heads", "total_num_kv_heads")  # by vLLM, to the settings of compressed-tensors


class Asked(nn.Module):
    """A layer of vLLM's as a format looks at it before it is built."""

    def __init__(self, kind: str, prefix: str) -> None:
        super().__init__()
        self.kind, self.prefix = kind, prefix


class PymllmConfig(QuantizationConfig):  # type: ignore[misc]
    """The checkpoint's own format with rules over it, as vLLM asks for methods.

    settings: a `quantization_config`: the checkpoint's own, or `{"quant_method": "pymllm"}` with `quant` (rules),
    `compute` and `kernels` as for `pymllm.load_model`.  None: a plain checkpoint.
    """

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        given = {key: value for key, value in (settings or {}).items() if key not in ADDED}
        ours = given.get("quant_method") == NAME
        options = {key: value for key, value in given.items() if key != "quant_method"} if ours else {}
        for key in options:
            if key not in OPTIONS:
                raise ConfigError(
                    f"the quantisation pymllm has no setting {key!r}",
                    code="config-value",
                    tensor=f"{ROOT}.{key}",
                    expected=choices(OPTIONS, key),
                    fix=nearest(key, OPTIONS),
                )
        self.rules = read_rules(options.get("quant"))
        self.compute = options.get("compute", "auto")
        if self.compute not in ("auto", "exact", "checkpoint"):
            raise ConfigError(
                "unknown compute mode",
                code="compute",
                expected="auto, exact or checkpoint",
                found=str(self.compute),
            )
        self.kernels = tuple(dict(options.get("kernels") or {}).items())
        self.headers: Mapping[str, StoredTensor] = {}
        self.tied = False
        self._source: tuple[Any, ...] | None = None
        self.format: OurConfig
        if ours or not given:
            self.format = get_quantization_config("none").from_config({})
        else:
            name = method_name(given.get("quant_method"))
            self.format = get_quantization_config(name).from_config(Settings(given))
        # The parts that have our methods, and the names of all tensors that these read.
        self.hosted: set[str] = set()
        self.used: set[str] = set()
        self.renamed: dict[str, str] = {}  # ends of tensors' names that no parameter can have
        self._stored_names: dict[str, str] = {}
        self._ruled: RuledConfig | None = None
        self._mapper: Any = None

    # What vLLM asks of a config

    @classmethod
    def get_name(cls) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return self.format.get_supported_act_dtypes()

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # the reference kernel runs anywhere

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # `maybe_update_config` reads them

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PymllmConfig:
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take a checkpoint of any format where the user asks for pymllm, and no other."""
        return NAME if user_quant == NAME else None

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Drop the tensors of our layers that no kernel needs, once their content has proved it, and no others.

        vLLM asks as it begins to load, when all layers are built.
        """
        ruled, unneeded = self.ruled, {}
        for name, stored in self._stored_names.items():
            if name not in self.used and name.startswith(tuple(f"{part}." for part in self.hosted)):
                said = ruled.skip_reason(name)
                if said is not None:
                    skip = Skip(said) if isinstance(said, str) else said
                    unneeded[stored] = (self.headers[stored], skip)
        check_skipped(tuple(unneeded.values()))  # type: ignore[arg-type]
        names = "|".join(map(re.escape, unneeded))
        dropped = {re.compile(f"^(?:{names})$"): None} if unneeded else {}
        return WeightsMapper(orig_to_new_regex=dropped, orig_to_new_suffix=self.renamed)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read the checkpoint's headers and settings, from which a format knows what its config leaves open.

        RuleError for a rule that names no module of the checkpoint.
        """
        found = open_checkpoint(resolve_model_path(model_name, revision))
        hoist_settings(found)
        self.format, self.headers = read_quantization_config(found), found.tensors
        self.tied = bool(getattr(hf_config, "tie_word_embeddings", False))
        self._source, self._ruled = (model_name, hf_config, revision), None
        self._check_rules()

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files out: vLLM sends its config to its processes, and each of them reads the headers again."""
        left_out: dict[str, Any] = {"headers": {}, "_ruled": None}
        return vars(self) | (left_out if self._source is None else left_out | {"format": None})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._source is not None:
            self.maybe_update_config(*self._source)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Learn vLLM's names of the checkpoint's tensors."""
        self._mapper, self._ruled = hf_to_vllm_mapper, None

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of a layer; None, or vLLM's own, for one that stays in plain floats."""
        if isinstance(layer, LinearBase):
            kind = "router" if prefix.rpartition(".")[2] in ROUTERS else "linear"
            parts = self._parts(prefix)
            return self._method(kind, parts) or UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            kind = "lm_head" if isinstance(layer, ParallelLMHead) else "embedding"
            method = self._method(kind, [prefix])
            if method is not None and self.tied:
                raise refuse_tied(prefix)
            return method
        if isinstance(layer, RoutedExperts):
            self._refuse_experts(prefix)
        elif isinstance(layer, Attention):
            asked = Asked("attention", prefix)
            return BaseKVCacheMethod(self) if self.format.get_kv_cache_method(asked, prefix) else None
        return None

    # How these are answered

    @property
    def ruled(self) -> RuledConfig:
        """The format with the rules over it, under vLLM's names of modules."""
        if self._ruled is None:
            pairs = {name: name for name in self.headers}
            if self._mapper is not None:
                mapped = ((self._mapper.map_name(name), name) for name in self.headers)
                pairs = {new: name for new, name in mapped if new is not None}
            self._stored_names = pairs
            self.format.see_names(ModuleNames(pairs.items()))
            if pairs:
                stored = {new: self.headers[name] for new, name in pairs.items()}
                self.format.see_checkpoint(with_stack_members(stored))
            self._ruled = RuledConfig(self.format, self.rules)
        return self._ruled

    def _parts(self, prefix: str) -> list[str]:
        """Return the checkpoint names of what a layer fuses; one where the files have it in one tensor."""
        parent, _, last = prefix.rpartition(".")
        names = self.packed_modules_mapping.get(last, [last])
        parts = [f"{parent}.{name}" if parent else name for name in names]
        stored = self.ruled.stored_modules
        return [prefix] if prefix in stored and not any(part in stored for part in parts) else parts

    def _method(self, kind: str, parts: list[str]) -> HostedLinearMethod | None:
        """Make the method of a layer.  None: all of its parts are plain floats."""
        ruled = self.ruled
        methods: list[OurMethod] = [
            ruled.get_quant_method(Asked(kind, part), part) or PlainMethod() for part in parts
        ]
        if all(isinstance(method, PlainMethod) for method in methods):
            return None
        return HostedLinearMethod(parts, methods, self)

    def _refuse_experts(self, prefix: str) -> None:
        """Refuse experts that the checkpoint or a rule quantises: vLLM fuses them in kernels of its own."""
        inside = {name for name in self.ruled.stored_modules if name.startswith(f"{prefix}.")}
        for name in sorted(inside) or [f"{prefix}.0.up_proj"]:
            if self._method("linear", [name]) is not None:
                raise ConfigError(
                    "quantised experts are not run inside vLLM",
                    code="not-hosted",
                    tensor=name,
                    fix="Serve the checkpoint with pymllm, or leave the experts out of your rules.",
                )

    def _check_rules(self) -> None:
        modules = {name.rpartition(".")[0] for name in self.headers}
        for rule in self.rules:
            if modules and not any(rule.matches(name) for name in modules):
                raise RuleError(
                    f"{str(rule)!r} matches no module of the checkpoint",
                    code="rule-unmatched",
                    fix=nearest(rule.pattern, modules),
                )


def register() -> None:
    """Make the quantisation "pymllm" known to vLLM: the entry point's function.  It may be called again."""
    register_quantization_config(NAME)(PymllmConfig)
