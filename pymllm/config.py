"""A run's settings as values: `ModelConfig` (a checkpoint's config.json, read) and `Execution` (how to run it)."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from pymllm.errors import ConfigError, choices, nearest

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Their short names elsewhere.
SHORT_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}


@dataclass(frozen=True)
class Execution:
    """The way that layers run: device, dtype of activations, exactness, forced kernels.

    It is current for a `with` block, while a model is built.
    compute: "auto", "exact" or "checkpoint", see `LinearProblem`.  kernels: pairs (operation, forced kernel's name).
    kv_dtype: of keys and values that are kept in floats; None: `dtype`.
    kept_floats: by name, the tensors whose floats stay in the checkpoint's dtype, which is narrower than `dtype`.
    block_length: of attention by blocks, in which a query sees its whole block; 1: a query sees what came before it.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    compute: Any = "exact"
    kernels: tuple[tuple[str, str], ...] = ()
    kv_dtype: torch.dtype | None = None
    kept_floats: Mapping[str, torch.dtype] = field(default_factory=dict, compare=False, repr=False)
    block_length: int = 1

    def forced_kernel(self, operation: str) -> str | None:
        """Return the name of the kernel that the user forces for an operation; None: none."""
        return dict(self.kernels).get(operation)

    def __enter__(self) -> Execution:
        _stack.set((*_stack.get(), self))
        return self

    def __exit__(self, *exception: object) -> None:
        _stack.set(_stack.get()[:-1])


_stack: ContextVar[tuple[Execution, ...]] = ContextVar("execution", default=())


def current_execution() -> Execution | None:
    """Return the innermost `with Execution(...)`; None outside of any."""
    stack = _stack.get()
    return stack[-1] if stack else None


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """Turn a name into a torch dtype, by its short names too.  ConfigError for what is no dtype of activations."""
    if isinstance(name, torch.dtype):
        name = str(name)
    short = str(name).removeprefix("torch.")
    short = SHORT_DTYPES.get(short, short)
    if short not in DTYPES:
        raise ConfigError(
            f"layers cannot pass the dtype {name!r} to each other",
            code="dtype-unknown",
            expected="auto or " + " or ".join(DTYPES),
            found=str(name),
            fix=nearest(short.lower(), [*DTYPES, *SHORT_DTYPES]),
        )
    return DTYPES[short]


class ModelConfig:
    """A Hugging Face config.json with the field's standard names.

    An attribute is looked up in the file, then in the model family's `defaults`; a missing one is a ConfigError (an
    AttributeError to `getattr`), never a guess. A setting that files spell in several ways has a property here.
    """

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        self.raw = dict(raw)
        self.defaults = dict(defaults or {})
        self.asked: set[str] = set()  # the settings that were looked up
        self.headless = False  # True for a decoder whose checkpoint has no head, and ties none

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("raw", "defaults", "asked"):
            raise AttributeError(name)
        self.asked.add(name)
        for source in (self.raw, self.defaults):
            if name in source:
                return source[name]
        raise MissingSetting(name, self.raw)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a setting of the file, else of the family's defaults, else `default`."""
        self.asked.add(name)
        return self.raw.get(name, self.defaults.get(name, default))

    def size(self, name: str) -> int:
        """Return a setting that must be a positive integer."""
        return _positive(name, getattr(self, name))

    def number(self, name: str) -> float:
        """Return a setting that must be a number above 0."""
        value = getattr(self, name)
        if value is None:
            raise _bad_value(name, value, "a number above 0")
        return _number(name, value, 0.0)

    def number_or_none(self, name: str) -> float | None:
        """Return a setting that must be a number above 0, or null, which switches off what it is for."""
        return None if getattr(self, name) is None else self.number(name)

    @property
    def num_key_value_heads(self) -> int:
        given = self.get("num_key_value_heads")
        return self.size("num_attention_heads") if given is None else _positive("num_key_value_heads", given)

    @property
    def head_dim(self) -> int:
        given = self.get("head_dim")
        if given is None:
            return self.size("hidden_size") // self.size("num_attention_heads")
        return _positive("head_dim", given)

    @property
    def rope_parameters(self) -> RopeParameters:
        return RopeParameters.read(self)

    def rope_parameters_of(self, layer: int) -> RopeParameters:
        """Return the rotary settings of one layer: sliding layers may have others than full ones."""
        kind, settings = self.attention_kind_of(layer), self.raw.get("rope_parameters")
        if kind is None and isinstance(settings, Mapping) and set(settings) >= set(ATTENTION_KINDS):
            expected = "one set of settings, as no layer_types tell layers apart"
            raise _bad_value("rope_parameters", sorted(map(str, settings)), expected)
        return RopeParameters.read(self, kind)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that the checkpoint was saved in; None: the file does not say."""
        name = self.raw.get("dtype", self.raw.get("torch_dtype"))
        return None if name is None else parse_dtype(str(name))

    @property
    def rms_norm_eps(self) -> float:
        return _number("rms_norm_eps", self.raw.get("rms_norm_eps"), self.defaults.get("rms_norm_eps", 1e-6))

    def check_heads(self) -> None:
        """Raise ConfigError where query heads cannot share the key heads, or no layer's heads fill the hidden size."""
        heads, keys = self.size("num_attention_heads"), self.num_key_value_heads
        if heads % keys:
            raise _bad_value(
                "num_key_value_heads", keys, f"a divisor of {heads}, which num_attention_heads is"
            )
        hidden = self.size("hidden_size")
        if self.get("head_dim") is None and hidden % heads:
            raise _bad_value("num_attention_heads", heads, f"a divisor of {hidden}, which hidden_size is")

    wrapper: Any = None  # the model of several kinds of input that this text model is a part of

    def untied(self) -> ModelConfig:
        """Return the same config for a head with weights of its own."""
        found = ModelConfig({**self.raw, "tie_word_embeddings": False}, self.defaults)
        found.wrapper = self.wrapper
        return found

    def without_head(self) -> ModelConfig:
        """Return the same config for a decoder that has no head."""
        config = ModelConfig(self.raw, self.defaults)
        config.headless = True
        return config

    @property
    def tie_word_embeddings(self) -> bool:
        tied = self.get("tie_word_embeddings")
        if tied is not None and not isinstance(tied, bool):
            raise _bad_value("tie_word_embeddings", tied, "true, false or null")
        return bool(tied)

    @property
    def head_names(self) -> tuple[str, str]:
        """The names of the head, and of the embedding that it may be tied to."""
        return "lm_head", self.defaults.get("embedding_name", "model.embed_tokens")

    def attention_kind_of(self, layer: int) -> str | None:
        """Return "full_attention", "sliding_attention" or, in a family that has it, "linear_attention".

        None where none of layer_types, full_attention_interval and sliding_window_pattern tells layers apart.
        """
        kinds, pattern = self.get("layer_types"), self.get("sliding_window_pattern")
        if kinds is None and INTERVAL in self.defaults:  # of so many layers in a row, the last one is full
            return LINEAR if (layer + 1) % self.size(INTERVAL) else "full_attention"
        if kinds is None and pattern is not None:  # of so many layers in a row, the last one is full
            full = (layer + 1) % _positive("sliding_window_pattern", pattern) == 0
            return "full_attention" if full else "sliding_attention"
        if kinds is None:
            return None
        layers = self.size("num_hidden_layers")
        allowed = (*ATTENTION_KINDS, LINEAR) if INTERVAL in self.defaults else ATTENTION_KINDS
        known = isinstance(kinds, list) and all(kind in allowed for kind in kinds)
        if not known or len(kinds) != layers:
            raise _bad_value("layer_types", kinds, f"{layers} of {' or '.join(allowed)}")
        return kinds[layer]

    def sliding_window_of(self, layer: int) -> int | None:
        """Return how many positions the attention of `layer` sees; None: all."""
        if "sliding_window" not in self.defaults and "sliding_window_pattern" not in self.defaults:
            return None  # the family has none; `refuse_ignored` looks at the setting
        window, kind = self.get("sliding_window"), self.attention_kind_of(layer)
        if window is None or window == 0 or self.get("use_sliding_window") is False:
            return None
        window = _positive("sliding_window", window)
        if window >= UNREACHED:
            return None
        if kind is not None:
            return window if kind == "sliding_attention" else None
        first = self.get("max_window_layers")
        return window if not first or layer >= _positive("max_window_layers", first) else None

    def _reaches_no_window(self) -> bool:
        """Tell whether no position that the model has is outside its window, or the window is switched off."""
        window, positions = self.raw.get("sliding_window"), self.get("max_position_embeddings")
        off = window == 0 or self.raw.get("use_sliding_window") is False
        return off or (isinstance(window, int) and isinstance(positions, int) and window >= positions)

    def refuse_ignored(self) -> None:
        """Raise ConfigError for a setting of the maths that a family has no default for and its model did not ask for.

        The model is to be built before.  Other families compute with such a setting; this one would answer as if it
        were not there.
        """
        for name, neutral in MATHS.items():
            value = self.raw.get(name)
            known = name in self.asked or name in self.defaults
            known |= name == "sliding_window" and self._reaches_no_window()
            if known or value is None or value in ([], {}, "") or value in neutral:
                continue
            raise ConfigError(
                f"config.json has {name}, which {self.raw.get('model_type')} does not compute with here",
                code="config-ignored",
                file="config.json",
                tensor=name,
                expected="null" + "".join(f" or {value!r}" for value in neutral),
                found=reprlib.repr(value),
                fix="If the model that was trained does not compute with it either, take it out of config.json.",
            )


# Settings that change what a model computes, and the values with which they do not.
MATHS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), (1,)),
    **dict.fromkeys(("scale_emb", "scale_depth", "final_logit_scale", "mup_width_scale"), (1,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "clip_qkv", "swiglu_limit"), (0,)),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "sliding_window"), ()),
    **dict.fromkeys(("attention_chunk_size", "use_bidirectional_attention"), (0,)),
    "is_causal": (True,),
    **dict.fromkeys(
        ("use_qk_norm", "qk_layernorm", "use_parallel_residual", "parallel_attn", "alibi"), (False,)
    ),
    **dict.fromkeys(("attn_temperature_tuning", "use_alibi", "scale_attn_by_inverse_layer_idx"), (False,)),
    **dict.fromkeys(("no_rope_layers", "no_rope_layer_interval", "rotary_pct", "rotary_dim"), ()),
    **dict.fromkeys(("use_sliding_window", "rope_interleave"), (False,)),
    "partial_rotary_factor": (1,),
}
UNREACHED = 2**31  # more positions than any text has, and than kernels count
LINEAR, INTERVAL = "linear_attention", "full_attention_interval"
ATTENTION_KINDS = ("full_attention", "sliding_attention")


# What settings are, whichever family has them; null is as good as none. What else a family asks of its own, it checks
# as it reads them. A size's own bounds are those of the tensors, which `prepare` compares it with.
WHOLE = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "type_vocab_size", "max_position_embeddings", "rotary_dim"),
    *("original_max_position_embeddings", "sliding_window", "sliding_window_pattern", "max_window_layers"),
    *("full_attention_interval", "global_attn_every_n_layers", "local_attention", "linear_conv_kernel_dim"),
    *("num_experts", "n_routed_experts", "num_local_experts", "num_experts_per_tok", "n_shared_experts"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "first_k_dense_replace"),
    *("n_group", "topk_group", "decoder_sparse_step", "q_lora_rank", "kv_lora_rank"),
    *("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "linear_num_key_heads", "linear_num_value_heads"),
    *("linear_key_head_dim", "linear_value_head_dim"),
}
SWITCHES = {
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "qkv_bias", "use_qkv_bias", "norm_topk_prob"),
    *("rope_interleave", "is_causal", "use_sliding_window", "use_qk_norm", "qk_layernorm"),
    *("use_parallel_residual", "parallel_attn", "alibi", "use_alibi"),
}
WORDS = {"hidden_act", "hidden_activation", "topk_method", "scoring_func", "dtype", "torch_dtype"}
# Numbers: above the first, at most the second.
BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps", "layernorm_epsilon"), (0, 1)),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), (1, 1e15)),
    "partial_rotary_factor": (0, 1),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), (1e-9, 1e9)),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar"), (1e-9, 1e9)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (-1, 1e9)),
    **dict.fromkeys(("routed_scaling_factor", "swiglu_alpha", "swiglu_limit"), (-1, 1e9)),
}
MOST = 1 << 62  # a whole number of torch's own


def check_values(raw: Mapping[str, Any]) -> None:
    """Raise ConfigError for a setting of a config.json whose value is of no kind that the setting can have."""
    for name, value in raw.items():
        if value is None:
            continue
        if name in WHOLE and not (type(value) is int and abs(value) < MOST):
            raise _bad_value(name, value, "an integer")
        if name in SWITCHES and not isinstance(value, bool):
            raise _bad_value(name, value, "true, false or null")
        if name in WORDS and not isinstance(value, str):
            raise _bad_value(name, value, "a name")
        if name in BOUNDS:
            _between(name, value, *BOUNDS[name])


def _between(name: str, value: Any, least: float, most: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least < value <= most:
        raise _bad_value(name, value, f"a number above {least:g}, {most:g} at most")


def _bad_value(name: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(
        f"the setting {name} has a value that it cannot have",
        code="config-value",
        file="config.json",
        tensor=name,
        expected=expected,
        found=reprlib.repr(value),
    )


def _number(name: str, value: Any, default: float, *, zero: bool = False) -> float:
    """Check that a setting is a finite number above 0 (zero: or 0).  None stands for the default."""
    if value is None:
        return default
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (0 < value <= sys.float_info.max or (zero and value == 0)):
        raise _bad_value(name, value, f"a number {'of at least' if zero else 'above'} 0")
    return float(value)


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _bad_value(name, value, "an integer of at least 1")
    return value


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

    transformers 4 wrote `rope_theta` and `rope_scaling`; transformers 5 writes both into `rope_parameters`.
    """

    theta: float = 10000.0
    rope_type: str = "default"
    partial_rotary_factor: float = 1.0
    scaling: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, config: ModelConfig, kind: str | None = None) -> RopeParameters:
        """Read the rotary settings of a config.

        kind: of a layer's attention, as `ModelConfig.attention_kind_of` returns it; in Gemma 3 sliding layers have a
        base of their own, and never a scaling.
        """
        given, older = config.raw.get("rope_parameters"), config.raw.get("rope_scaling")
        _refuse_two_scalings(given, older)
        given = given or older
        settings = given or config.defaults.get("rope_parameters") or {}
        base, local = config.get("rope_theta"), config.get("rope_local_base_freq")
        if isinstance(settings, Mapping) and settings.keys() & set(ATTENTION_KINDS):
            settings = settings.get(kind or "full_attention") or {}
        elif kind == "sliding_attention" and local is not None:
            settings = {}
        if kind == "sliding_attention" and local is not None:
            base = local
        if not isinstance(settings, Mapping):
            raise _bad_value("rope_parameters", settings, "an object")
        scaling = settings.get("rope_type") or settings.get("type")
        asked = [name for name in SCALINGS if settings.get(name) is not None]
        if scaling is None and asked and "long_factor" not in settings:
            raise _bad_value("rope_type", None, f"a name, as {asked[0]} asks for a scaling")
        for name in asked:
            _number(name, settings[name], 0.0)
        scaling = scaling or "default"
        if not isinstance(scaling, str):
            raise _bad_value("rope_type", scaling, "a name")
        # Early files call longrope su, or yarn, and have the trained length beside these settings.
        if "long_factor" in settings:
            scaling, trained = "longrope", config.get("original_max_position_embeddings")
            settings = {"original_max_position_embeddings": trained, **settings}
        for name, value in settings.items():
            if name not in ROPE_NAMES and value is not None and value not in ([], {}, ""):
                raise ConfigError(
                    f"the rotary setting {name} is not known, and may change the frequencies",
                    code="config-ignored",
                    file="config.json",
                    tensor=f"rope_parameters.{name}",
                    expected=choices(sorted(ROPE_NAMES), name),
                    found=reprlib.repr(value),
                    fix=nearest(str(name), ROPE_NAMES),
                )
        for name in ROPE_NUMBERS:
            _number(name, settings.get(name), 0.0, zero=True)
            if settings.get(name):
                _between(name, settings[name], 0, ROPE_MOST)
        for name in ("rope_theta", "partial_rotary_factor"):
            if settings.get(name) is not None:
                _between(name, settings[name], *BOUNDS[name])
        theta = settings.get("rope_theta") or base
        partial = settings.get("partial_rotary_factor") or config.get("partial_rotary_factor")
        return cls(
            _number("rope_theta", theta, cls.theta),
            scaling,
            _number("partial_rotary_factor", partial, cls.partial_rotary_factor),
            dict(settings),
        )


def _refuse_two_scalings(parameters: Any, scaling: Any) -> None:
    """Raise ConfigError where `rope_scaling` says something that `rope_parameters`, which is read, does not."""
    if not (isinstance(parameters, Mapping) and parameters and isinstance(scaling, Mapping)):
        return
    for name, value in scaling.items():
        found = parameters.get("rope_type" if name == "type" else name)
        if value is not None and value != found:
            raise ConfigError(
                "config.json has rope_scaling and rope_parameters, which differ",
                code="config-ignored",
                file="config.json",
                tensor=f"rope_scaling.{name}",
                expected=f"{found!r}, as in rope_parameters",
                found=reprlib.repr(value),
                fix="Take out the one that is not meant.",
            )


ROPE_MOST = 1e9  # of a factor, a length or a share
ROPE_NUMBERS = (
    *("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"),
)
ROPE_NAMES = {
    *ROPE_NUMBERS,
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "short_factor", "long_factor", "factors"),
    *("truncate", "max_position_embeddings"),
    # Notes of writers: the model was trained with the scaling; positions of images, which texts do not have.
    *("finetuned", "mrope_section", "mrope_interleaved"),
}
# What only a scaling has, and no scaling has as 0.
SCALINGS = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
