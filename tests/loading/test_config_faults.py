"""A config that is wrong, hostile, or of another model: one error that names the setting, before anything is read."""

from __future__ import annotations

import json
import sys

import pytest

from pymllm.api import load_model
from pymllm.errors import CheckpointError, ConfigError, PymllmError

from ..checkpoints import AWQ, edit_config, write_checkpoint
from ..forward import logits_of
from .refusal import refused


@pytest.mark.parametrize(
    "name, near",
    (("awqq", "awq"), ("AWQ_marlin", "awq"), ("compressed_tensor", "compressed-tensors"), ("gguf7", "")),
)
def test_an_unknown_quant_method_lists_the_known_ones_and_never_falls_back(folder, reads, name, near):
    edit_config(folder, quantization_config={"quant_method": name})
    error = refused(folder, reads, ConfigError)
    assert error.code == "unknown-method" and near in str(error)
    assert all(known in str(error) for known in ("awq", "fp8", "compressed-tensors"))
    assert "config.json" in str(error)


def test_a_quantization_config_without_a_method_is_refused(folder, reads):
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]["quant_method"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert refused(folder, reads, ConfigError).code == "unknown-method"
    edit_config(folder, quantization_config="awq")
    assert refused(folder, reads, ConfigError).code == "quantization-config"


@pytest.mark.parametrize(
    "change", ({"bits": 3}, {"bits": None}, {"version": "gemv"}, {"group_size": 0}, {"group_size": "64"})
)
def test_awq_settings_that_cannot_be_read_are_named(folder, reads, change):
    edit_config(folder, quantization_config=change)
    error = refused(folder, reads, ConfigError)
    (key,) = change
    assert error.code == "quantization-config" and key in str(error)


def test_a_group_size_that_does_not_divide_is_refused_with_the_shapes(folder, reads):
    edit_config(folder, quantization_config={"group_size": 96})
    error = refused(folder, reads, ConfigError)
    assert (
        error.code == "group-size" and "96" in str(error) and "128" in str(error) and "q_proj" in str(error)
    )


def test_another_group_size_than_the_files_is_refused_with_both_shapes(folder, reads):
    edit_config(folder, quantization_config={"group_size": 32})
    error = refused(folder, reads)
    assert error.code == "shape" and "expected [4, 16], found [2, 16]" in str(error)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(
    "change",
    (
        {"hidden_size": 2**40},
        {"intermediate_size": 2**40},
        {"vocab_size": 2**60},
        {"head_dim": 2**40},
        {"num_attention_heads": 2**40},
        {"num_key_value_heads": 2**40},
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**30},
    ),
    ids=lambda change: "-".join(f"{key}-{value:.0e}" for key, value in change.items()),
)
def test_sizes_beyond_the_files_are_refused_without_allocating(folder, reads, change):
    """A real allocation of any of these would fail, or take long; the limit turns it into an error here."""
    edit_config(folder, **change)
    with memory_limit(2 << 30):
        error = refused(folder, reads, PymllmError)
    assert isinstance(error, (CheckpointError, ConfigError))


class memory_limit:
    """No more than `more` bytes of address space beyond what is in use."""

    def __init__(self, more):
        self.more = more

    def __enter__(self):
        import resource

        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        self.before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + self.more, self.before[1]))

    def __exit__(self, *_):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, self.before)


@pytest.mark.parametrize("value", (0, -1, 1.5, True, "128", [], float("inf")), ids=repr)
@pytest.mark.parametrize(
    "key",
    (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "head_dim",
    ),
)
def test_a_size_that_is_no_positive_integer_is_named(folder, reads, key, value):
    edit_config(folder, **{key: value})
    error = refused(folder, reads, PymllmError)
    assert key in str(error) and "config.json" in str(error)


GARBAGE = (None, True, -1, 0.5, float("nan"), 10**30, "x", [1, "x"], {"x": []})


def settings_of(raw):
    """(object, key) for every setting in a config.json, at any depth."""
    for key, value in list(raw.items()):
        yield raw, key
        if isinstance(value, dict):
            yield from settings_of(value)


@pytest.mark.parametrize("fmt", ("awq-g64", "fp8-block-static", "ct-block"))
def test_no_value_of_any_setting_gives_more_than_an_error_of_our_own(tmp_path, fmt):
    """Or the model loads and runs: not every setting matters."""
    good = write_checkpoint(tmp_path / "m", "llama", fmt, num_hidden_layers=1)
    raw = json.loads((good.folder / "config.json").read_text())
    for key in (
        "sliding_window",
        "layer_types",
        "rope_scaling",
        "partial_rotary_factor",
        "compression_config",
    ):
        raw[key] = None
    raw["quantization_config"]["ignored_layers"] = None
    # The model's own settings once; then only the format's.
    assert_only_errors_of_our_own(good, raw, raw if fmt == "awq-g64" else raw["quantization_config"])


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}


@pytest.mark.parametrize(
    "family, settings, absent",
    (
        ("gemma2", {}, ("sliding_window_pattern",)),
        ("gemma3_text", {}, ("sliding_window_pattern", "rope_local_base_freq")),
        ("phi3", {"rope_parameters": {"rope_theta": 1e4, **LONG}}, ("rope_scaling",)),
    ),
    ids=("gemma2", "gemma3_text", "phi3"),
)
def test_no_setting_of_other_families_gives_more_either(tmp_path, family, settings, absent):
    good = write_checkpoint(tmp_path / "m", family, **settings)
    raw = json.loads((good.folder / "config.json").read_text())
    raw |= dict.fromkeys(absent)
    assert_only_errors_of_our_own(good, raw, raw)


def assert_only_errors_of_our_own(good, raw, settings):
    """Whatever the settings are set to, one after the other."""
    path = good.folder / "config.json"
    escaped = {}
    for holder, key in list(settings_of(settings)):
        before = holder[key]
        for value in GARBAGE:
            holder[key] = value
            path.write_text(json.dumps(raw))
            try:
                logits_of(load_model(good.folder, device="cpu"), good.ids)
            except PymllmError:
                pass
            except Exception as error:
                escaped[f"{key}={value!r}"] = repr(error)
        holder[key] = before
    assert not escaped


@pytest.mark.parametrize(
    "fmt, field, pattern",
    (
        ("ct-block", "ignore", "re:model.(layers"),
        ("ct-block", "ignore", "re:*"),
        ("fp8-block", "modules_to_not_convert", "x("),
    ),
)
def test_a_pattern_of_the_checkpoint_that_is_no_regular_expression_is_named(
    tmp_path, reads, fmt, field, pattern
):
    good = write_checkpoint(tmp_path / "m", "llama", fmt, num_hidden_layers=1)
    edit_config(good.folder, quantization_config={field: [pattern]})
    error = refused(good.folder, reads, ConfigError)
    assert error.code == "quantization-config" and pattern in str(error) and field in str(error)


def test_more_layers_than_the_files_have_names_the_missing_tensors(folder, reads):
    edit_config(folder, num_hidden_layers=2)
    error = refused(folder, reads)
    assert "model.layers.1.self_attn.q_proj.qweight" in str(error)


def test_fewer_layers_than_the_files_have_names_the_extra_tensors(tmp_path, reads):
    two = write_checkpoint(tmp_path / "m", "llama", AWQ(64), num_hidden_layers=2)
    edit_config(two.folder, num_hidden_layers=1)
    error = refused(two.folder, reads)
    assert error.code == "unexpected" and "model.layers.1.self_attn.q_proj.qweight" in str(error)


def test_an_unknown_model_type_lists_the_known_ones(folder, reads):
    edit_config(folder, model_type="lama", architectures=["LamaForCausalLM"])
    error = refused(folder, reads, ConfigError)
    assert error.code == "model-type" and "Nearest: llama" in str(error)


CODE = "from pathlib import Path\nPath(__file__).with_name('RAN').touch()\n"
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}


@pytest.mark.parametrize("model_type", ("llama", "own", "../../own", "os", "__init__", "causal_lm"))
def test_code_that_a_checkpoint_brings_is_never_imported(folder, model_type):
    for name in ("configuration_own.py", "modeling_own.py", "own.py", "__init__.py", "tokenization_own.py"):
        (folder / name).write_text(CODE)
    edit_config(folder, model_type=model_type, auto_map=AUTO_MAP)
    modules = set(sys.modules)
    if model_type == "llama":
        load_model(folder, device="cpu")
    else:
        with pytest.raises(ConfigError) as caught:
            load_model(folder, device="cpu")
        assert caught.value.code == "model-type"
    assert not (folder / "RAN").exists()
    assert not [name for name in set(sys.modules) - modules if "own" in name.split(".")[-1]]
