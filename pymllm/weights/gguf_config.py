"""The settings of a config.json, read from a GGUF file's metadata.

A setting that is not known for the file's architecture is refused, as it may change what the model computes; one that
the file leaves out has the value that llama.cpp, the format's home, gives it, or is refused where there is none.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pymllm.errors import CheckpointError, counted
from pymllm.weights.gguf_architecture import GGUFArchitecture
from pymllm.weights.tensor_file import TensorInfo

# Keys after "ARCHITECTURE." -> config.json's keys; the values are the same.
SETTINGS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
REQUIRED = (
    *("block_count", "context_length", "embedding_length"),
    *("attention.head_count", "attention.layer_norm_rms_epsilon"),
)
# Further keys that are known: read below, or without an effect on what the model computes.
OTHER_SETTINGS = {"vocab_size", "attention.value_length", "rope.dimension_count", "tensor_data_layout"}
OTHER_SETTINGS |= {"expert_used_count", "rope.scale_linear", "n_ctx", "ctx_length"}
TEXTS = {"rope.scaling.type", "tensor_data_layout"}
SCALING = ("type", "factor", "original_context_length", "attn_factor", "finetuned")
YARN = ("yarn_beta_fast", "yarn_beta_slow", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier")
OTHER_SETTINGS |= {f"rope.scaling.{name}" for name in (*SCALING, *YARN)}
WINDOW, PATTERN, WINDOW_THETA = (
    *("attention.sliding_window", "attention.sliding_window_pattern"),
    "rope.freq_base_swa",
)
CONSTANTS: dict[str, tuple[Any, ...]] = {"attention.causal": (True,)}
TOKENS = {"bos_token_id": "bos_token_id", "padding_token_id": "pad_token_id"}
END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")

FREQUENCY_FACTORS = "rope_freqs.weight"
LONG_FACTORS = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
DEFAULT_THETA = 10000.0  # llama.cpp's, where a file has none
KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class ConfigReader:
    """A reader that turns a GGUF file's metadata into the settings of a config.json."""

    path: Path
    metadata: Mapping[str, Any]
    architecture: str
    known: GGUFArchitecture

    def read(self, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
        """Return the config.  tensors: by their names in the file; some settings only show in them."""
        config: dict[str, Any] = {"model_type": self.known.model_type, **self.known.fixed}
        self._check_keys()
        for key, name in (SETTINGS | dict(self.known.settings)).items():
            value = self._get(key)
            if value is not None:
                config[name] = self._same_for_all_layers(key, value)
        self._check_layers(config, len(tensors))
        self._check_heads(config)
        table = tensors.get("token_embd.weight")
        if table is not None and table.shape:
            config["vocab_size"] = table.shape[0]
        config["tie_word_embeddings"] = "output.weight" not in tensors
        attention_bias = "blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors
        config |= {"attention_bias": attention_bias, "qkv_bias": attention_bias}
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
        self._read_expert_sizes(config, tensors)
        self._read_windows(config)
        config["rope_parameters"] = self._rope_of_kinds(config, self._rope(config, tensors))
        config.pop("rope_theta", None)
        for key, name in TOKENS.items():
            token = self.metadata.get(f"tokenizer.ggml.{key}")
            if token is not None:
                config[name] = token
        ends = [self.metadata.get(f"tokenizer.ggml.{key}") for key in END_TOKENS]
        config["eos_token_id"] = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
        # Routers are stored in float32, whatever the others are.
        floats = {
            info.dtype_name
            for name, info in tensors.items()
            if len(info.shape) > 1 and ".ffn_gate_inp" not in name and not name.endswith(".bias")
        }
        plain = {"F16": "float16", "F32": "float32"}
        config["dtype"] = plain.get(next(iter(floats)), "bfloat16") if len(floats) == 1 else "bfloat16"
        self.known.finish(config)
        return config

    def _get(self, key: str) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}")
        # Writers round settings to float32: read 1e-5, which they mean, not 9.999999747378752e-06.
        rounded = isinstance(value, float) and abs(value) <= float(np.finfo(np.float32).max)
        return float(str(np.float32(value))) if rounded else value

    def _bad(
        self, key: str, expected: str, code: str = "config-value", fix: str | None = None
    ) -> CheckpointError:
        return CheckpointError(
            "the metadata has a setting that pymllm cannot honour for this architecture",
            code=code,
            file=str(self.path),
            tensor=f"{self.architecture}.{key}",
            expected=expected,
            found=reprlib.repr(self._get(key)),
            fix=fix,
        )

    def _same_for_all_layers(self, key: str, value: Any) -> Any:
        """Reduce a setting that is given for each layer to one value.  CheckpointError where the layers differ."""
        if isinstance(value, np.ndarray):
            if value.size == 0 or not (value == value[0]).all():
                raise self._bad(key, "the same value for all layers")
            return value[0].item()
        return value

    def _check_keys(self) -> None:
        """Raise CheckpointError "config-key" for an unknown setting: it may change what the model computes.

        "config-value": for one with another value than the model has; "config-missing-setting": for one that is needed.
        """
        constants = CONSTANTS | dict(self.known.constants)
        known = SETTINGS.keys() | OTHER_SETTINGS | self.known.settings.keys() | constants.keys()
        if self.known.sliding is not None:
            known |= {WINDOW, PATTERN, *([WINDOW_THETA] if self.known.sliding else [])}
        for name in self.metadata:
            key = name.removeprefix(f"{self.architecture}.")
            if key == name:
                continue
            value = self._get(key)
            self._check_kind(
                key, value, by_layer=key in SETTINGS or key in self.known.settings or key in constants
            )
            if key in constants and self._same_for_all_layers(key, value) not in constants[key]:
                code = "config-value" if key in self.known.constants else "config-key"
                raise self._bad(key, " or ".join(map(str, constants[key])), code)
            if key in known:
                continue
            if isinstance(value, (int, float, str)) and not value:
                continue  # zero, false and "" ask for nothing
            raise self._bad(key, f"only settings out of {', '.join(sorted(known))}", "config-key")
        for key in (*REQUIRED, *self.known.required):
            if self._get(key) is None:
                raise CheckpointError(
                    "the metadata lacks a setting of the model",
                    code="config-missing-setting",
                    file=str(self.path),
                    tensor=f"{self.architecture}.{key}",
                    fix="The file is badly written: convert or download it again.",
                )

    def _check_kind(self, key: str, value: Any, by_layer: bool) -> None:
        """Raise CheckpointError for a setting that is a list, a text or no finite number, where none can be.

        by_layer: whether a file may give it for each layer.
        """
        listed = isinstance(value, (list, np.ndarray))
        if listed and not (isinstance(value, np.ndarray) and (by_layer or key == PATTERN)):
            raise self._bad(key, "one value")
        if isinstance(value, float) and not math.isfinite(value):
            raise self._bad(key, "a finite number")
        known = key in SETTINGS or key in OTHER_SETTINGS or key in self.known.settings
        if known and key not in TEXTS and isinstance(value, (str, bool)):
            raise self._bad(key, "a number")

    def _check_layers(self, config: dict[str, Any], tensors: int) -> None:
        """Raise CheckpointError for more layers than the file has tensors, before a list of them is made."""
        layers = config["num_hidden_layers"]
        if type(layers) is not int or not 1 <= layers <= tensors:
            raise self._bad("block_count", f"1 to {tensors}, of which there are tensors")

    def _check_heads(self, config: dict[str, Any]) -> None:
        heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
        config.setdefault("num_key_value_heads", heads)
        if "head_dim" not in config and type(heads) is int and type(hidden) is int and heads > 0:
            config["head_dim"] = hidden // heads
        head_dim = config.get("head_dim")
        if type(head_dim) is not int or head_dim < 1:
            raise self._bad("attention.key_length", "a positive integer")
        for name, key in (("num_attention_heads", "head_count"), ("num_key_value_heads", "head_count_kv")):
            if type(config[name]) is not int or config[name] < 1:
                raise self._bad(f"attention.{key}", "a positive integer")
        if self._get("attention.value_length") not in (None, head_dim):
            raise self._bad("attention.value_length", f"{head_dim}, as for keys")
        if self.known.interleaved and head_dim % 2:
            raise self._bad("attention.key_length", "an even number")

    def _read_expert_sizes(self, config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        """Read from the tensors' shapes what early files leave out: the sizes of experts."""
        for key, tensor in (("expert_feed", "ffn_up_exps"), ("expert_shared_feed", "ffn_up_shexp")):
            name, info = (
                self.known.settings.get(f"{key}_forward_length"),
                tensors.get(f"blk.0.{tensor}.weight"),
            )
            if name is not None and info is not None and len(info.shape) > 1:
                config.setdefault(name, info.shape[-2])

    def _read_windows(self, config: dict[str, Any]) -> None:
        """Set the window, and which layers have it."""
        window, sliding = self._get(WINDOW), self.known.sliding
        if window is not None:
            config["sliding_window"] = self._same_for_all_layers(WINDOW, window)
        if sliding is None:
            return
        layers, pattern = config["num_hidden_layers"], self._get(PATTERN)
        if not config.get("sliding_window"):
            config["sliding_window"] = None
            if sliding:
                config["layer_types"] = [KINDS[0]] * layers
            return
        if self.known.windowed_type is not None:
            config["model_type"] = self.known.windowed_type
        if isinstance(pattern, np.ndarray):
            if pattern.shape != (layers,):
                raise self._bad(PATTERN, f"{counted(layers, 'value')}, one for each layer")
            slides = [bool(value) for value in pattern]
        elif pattern is not None or sliding:
            every = sliding if pattern is None else pattern
            if type(every) is not int or every < 0:
                raise self._bad(PATTERN, "a number of layers, or one value for each layer")
            slides = [every == 0 or layer % every < every - 1 for layer in range(layers)]
        else:
            config |= {"use_sliding_window": True, "max_window_layers": 0}
            return
        config["layer_types"] = [KINDS[slide] for slide in slides]

    def _rope_of_kinds(self, config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
        """Return the rotary settings of full and of sliding layers, or those of all where they do not differ."""
        if KINDS[1] not in config.get("layer_types", ()):
            return rope
        theta = self._get(WINDOW_THETA) or self.known.sliding_theta or rope["rope_theta"]
        kept = ("rope_type", "rope_theta", "partial_rotary_factor")
        sliding = rope if self.known.sliding_scaled else {name: rope[name] for name in kept if name in rope}
        if not self.known.sliding_scaled:
            sliding |= {"rope_type": "default"}
        sliding = sliding | {"rope_theta": theta}
        return rope if sliding == rope else dict(zip(KINDS, (rope, sliding), strict=True))

    def _rope(self, config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
        """Return `rope_parameters`, whichever way the file spells them."""
        head_dim = config["head_dim"]
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.get("rope_theta", DEFAULT_THETA)}
        rotated = self._get("rope.dimension_count")
        if rotated not in (None, head_dim):
            if type(rotated) is not int or not 0 < rotated < head_dim or self.known.interleaved:
                raise self._bad("rope.dimension_count", str(head_dim))
            factor = rotated / head_dim
            # int() of the product must be the count again: 0.58 · 100 is just below 58.
            rope["partial_rotary_factor"] = (
                factor if int(head_dim * factor) == rotated else math.nextafter(factor, 1)
            )
        self._read_scaling(rope, any(name in tensors for name in LONG_FACTORS.values()))
        count = (rotated or head_dim) // 2
        if FREQUENCY_FACTORS in tensors:
            if rope["rope_type"] != "default":
                raise self._bad("rope.scaling.type", f"none, as the file has {FREQUENCY_FACTORS}")
            factors = self._factors(FREQUENCY_FACTORS, tensors, count)
            rope |= {"rope_type": "factors", "factors": factors}
        elif rope["rope_type"] == "longrope":
            rope |= {key: self._factors(name, tensors, count) for key, name in LONG_FACTORS.items()}
        return rope

    def _read_scaling(self, rope: dict[str, Any], long: bool) -> None:
        """Add the rotary scaling to `rope`.  long: whether the file has the factors of LongRoPE."""
        kind = self._get("rope.scaling.type")
        factor = self._get("rope.scaling.factor") or self._get("rope.scale_linear")
        trained = self._get("rope.scaling.original_context_length")
        attention = self._get("rope.scaling.attn_factor")
        if long and kind in (None, "longrope"):
            # Writers of Phi-3 do not name the type.  The factor on cosines and sines stands in the file alone.
            if not trained or not attention:
                missing = "attn_factor" if trained else "original_context_length"
                raise self._bad(f"rope.scaling.{missing}", "a number, as the file has rope_factors_long")
            rope |= {"rope_type": "longrope", "attention_factor": attention}
            rope["original_max_position_embeddings"] = trained
            return
        if long:
            raise self._bad("rope.scaling.type", "longrope, as the file has rope_factors_long")
        if attention not in (None, 0, 1):
            raise self._bad("rope.scaling.attn_factor", "1")
        if kind in (None, "none", "linear") and (kind == "none" or factor in (None, 0, 1)):
            return
        if kind in (None, "linear"):
            rope |= {"rope_type": "linear", "factor": factor}
            return
        if kind != "yarn":
            expected = "none or linear or yarn"
            raise self._bad("rope.scaling.type", f"{expected}, or longrope with the tensors of its factors")
        if not factor:
            raise self._bad("rope.scaling.factor", "a number above 0, as the type is yarn")
        rope |= {"rope_type": "yarn", "factor": factor}
        if trained:
            rope["original_max_position_embeddings"] = trained
        for key, name in {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}.items():
            if self._get(f"rope.scaling.{key}"):
                rope[name] = self._get(f"rope.scaling.{key}")
        # llama.cpp computes this factor; models whose config has it spell out the same value.
        usual = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0
        given = self._get("rope.scaling.yarn_attn_factor")
        if given not in (None, 1.0) and not math.isclose(given, usual, rel_tol=1e-6):
            raise self._bad("rope.scaling.yarn_attn_factor", f"{usual:.7f}, which follows from the factor")
        if self._get("rope.scaling.yarn_ext_factor") not in (None, 1.0, -1.0):
            raise self._bad("rope.scaling.yarn_ext_factor", "1")
        if self._get("rope.scaling.yarn_log_multiplier"):
            raise self._bad("rope.scaling.yarn_log_multiplier", "0")

    def _factors(self, name: str, tensors: Mapping[str, TensorInfo], count: int) -> list[float]:
        """Read rotary frequency factors.  count: of rotated pairs of a head."""
        stored = tensors.get(name)
        if stored is None or stored.torch_dtype is not torch.float32 or stored.shape != (count,):
            raise CheckpointError(
                "the rotary frequency factors do not fit the heads",
                code="shape",
                file=str(self.path),
                tensor=name,
                expected=f"F32 [{count}], one for each rotated pair of a head",
                found="no such tensor" if stored is None else f"{stored.dtype_name} {list(stored.shape)}",
            )
        values = stored.read()
        if not bool((values.isfinite() & (values > 0)).all()):
            raise CheckpointError(
                "a rotary frequency factor is not a positive number",
                code="bad-content",
                file=str(self.path),
                tensor=name,
                fix="The file is damaged or badly written: download it or convert it again.",
            )
        return list(values.tolist())
