"""What is to be run, as values: `ModelConfig` (a checkpoint's config.json, read) and `Execution` (how to run it)."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from pymllm.errors import ConfigError, nearest

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Execution:
    """How layers run: where, in which activation dtype, how exactly, with which kernels forced.

    kernels: pairs (operation, kernel name).  Current for a `with` block while a model is built.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    compute: Any = "auto"
    kernels: tuple[tuple[str, str], ...] = ()

    def forced_kernel(self, operation: str) -> str | None:
        return dict(self.kernels).get(operation)

    def __enter__(self) -> Execution:
        _stack.set((*_stack.get(), self))
        return self

    def __exit__(self, *exception: object) -> None:
        _stack.set(_stack.get()[:-1])


_stack: ContextVar[tuple[Execution, ...]] = ContextVar("execution", default=())


def current_execution() -> Execution | None:
    """The innermost `with Execution(...)`."""
    stack = _stack.get()
    return stack[-1] if stack else None


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """A torch dtype from its name.  ConfigError for anything that activations cannot have."""
    if isinstance(name, torch.dtype):
        name = str(name)
    short = str(name).removeprefix("torch.")
    if short not in DTYPES:
        raise ConfigError(
            f"activations cannot have the dtype {name!r}",
            code="dtype-unknown",
            expected="auto or " + " or ".join(DTYPES),
            found=str(name),
            fix=nearest(short, DTYPES),
        )
    return DTYPES[short]


class ModelConfig:
    """A Hugging Face config.json with the field's standard names.

    Attributes read the file, then the model family's `defaults`; a missing one is a ConfigError (an AttributeError
    to `getattr`), never a guess. What files spell in several ways has a property here.
    """

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        self.raw = dict(raw)
        self.defaults = dict(defaults or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("raw", "defaults"):
            raise AttributeError(name)
        for source in (self.raw, self.defaults):
            if name in source:
                return source[name]
        raise MissingSetting(name, self.raw)

    def get(self, name: str, default: Any = None) -> Any:
        return self.raw.get(name, self.defaults.get(name, default))

    def size(self, name: str) -> int:
        """A size that must be a positive integer."""
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"{name} must be a positive integer",
                code="config-value",
                file="config.json",
                tensor=name,
                expected="an integer of at least 1",
                found=repr(value),
            )
        return value

    @property
    def num_key_value_heads(self) -> int:
        return self.get("num_key_value_heads") or self.size("num_attention_heads")

    @property
    def head_dim(self) -> int:
        return self.get("head_dim") or self.size("hidden_size") // self.size("num_attention_heads")

    @property
    def rope_parameters(self) -> RopeParameters:
        return RopeParameters.read(self)

    @property
    def dtype(self) -> torch.dtype | None:
        """What the checkpoint was saved in, if it says so."""
        name = self.raw.get("dtype", self.raw.get("torch_dtype"))
        return DTYPES.get(str(name).removeprefix("torch."))

    @property
    def tie_word_embeddings(self) -> bool:
        return bool(self.get("tie_word_embeddings", False))

    def sliding_window_of(self, layer: int) -> int | None:
        """How many positions the attention of `layer` sees; None: all."""
        window = self.get("sliding_window")
        if not window or self.get("use_sliding_window") is False:
            return None
        kinds = self.get("layer_types")
        if kinds is not None:
            return window if kinds[layer] == "sliding_attention" else None
        return window if layer >= (self.get("max_window_layers") or 0) else None


class MissingSetting(ConfigError, AttributeError):
    """A setting that config.json lacks and the family has no default for."""

    def __init__(self, setting: str, raw: Mapping[str, Any]) -> None:
        super().__init__(
            f"the setting {setting!r} is missing",
            code="config-missing-setting",
            file="config.json",
            tensor=setting,
            fix=nearest(setting, raw),
        )


@dataclass(frozen=True)
class RopeParameters:
    """Rotary settings, whichever way config.json spells them.

    transformers 4 wrote `rope_theta` and `rope_scaling`; 5 writes both into `rope_parameters`.
    """

    theta: float = 10000.0
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0
    scaling: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, config: ModelConfig) -> RopeParameters:
        settings = config.raw.get("rope_parameters") or config.raw.get("rope_scaling") or {}
        if not isinstance(settings, Mapping):
            raise ConfigError(
                "the rotary settings must be an object",
                code="config-value",
                file="config.json",
                tensor="rope_parameters",
                found=repr(settings),
            )
        if "full_attention" in settings:  # one set for each kind of layer; dense families use one
            settings = settings["full_attention"]
        theta = settings.get("rope_theta", config.get("rope_theta", 10000.0))
        kind = settings.get("rope_type", settings.get("type", "default"))
        partial = settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        return cls(float(theta), kind, float(partial), dict(settings))
