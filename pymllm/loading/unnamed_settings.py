"""Quantisation settings that name no `quant_method`, as mlx-lm writes them: whose they are, and that they agree."""

from __future__ import annotations

from collections.abc import Mapping

from pymllm.errors import ConfigError
from pymllm.quantization.base import QuantizationConfig, get_quantization_config, list_quantization_methods
from pymllm.quantization.storage.settings import Settings
from pymllm.weights.checkpoint import Checkpoint

USUAL_KEY = "quantization_config"


def read_unnamed_settings(checkpoint: Checkpoint) -> QuantizationConfig | None:
    """Read settings under a format's own key in config.json, or under `quantization_config` without a quant_method.

    None: there are none.  ConfigError for two that differ, for settings that no format knows, or as `from_config`.
    """
    config, found = checkpoint.config, {}
    own_keys: dict[str, None] = {}
    for name in list_quantization_methods():
        format_config = get_quantization_config(name)
        keys = format_config.get_config_keys()
        own_keys |= dict.fromkeys(keys)
        for key in (*keys, USUAL_KEY) if keys else ():
            settings = config.get(key)
            if isinstance(settings, Mapping) and format_config.claims(settings, checkpoint.tensors):
                wrapped = Settings(settings, file=str(checkpoint.config_file), root=key)
                found[key] = format_config.from_config(wrapped)
    named = config.get(USUAL_KEY) or config.get("compression_config")
    for key in own_keys:
        if isinstance(config.get(key), Mapping) and config[key] and key not in found and not named:
            raise ConfigError(
                f"the settings under {key!r} are of no known format, or what is stored is not in it",
                code="quantization-config",
                file=str(checkpoint.config_file),
                tensor=key,
                expected="bits, group_size and mode, and uint32 weights with scales, as mlx-lm writes them",
                found=repr(config[key])[:200],
            )
    if not found:
        return None
    kinds = list(found.values())
    same = all(type(kind) is type(kinds[0]) and vars(kind) == vars(kinds[0]) for kind in kinds)
    if not same or (named and USUAL_KEY not in found):
        key = next(key for key in found if key != USUAL_KEY)
        raise ConfigError(
            f"{key} and {USUAL_KEY} say different things of the same weights",
            code="quantization-config",
            file=str(checkpoint.config_file),
            tensor=key,
            expected=f"{key} as {USUAL_KEY}, or one of them alone",
            found=f"{key} {repr(config[key])[:200]}, {USUAL_KEY} {repr(named)[:200]}",
            fix="Keep the one that the weights were written with: take the other out of config.json.",
        )
    return kinds[0]
