"""Settings of a quantisation: none is ignored that could change what a checkpoint's weights mean."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pymllm
from pymllm.checking.verify import verify
from pymllm.errors import ConfigError
from pymllm.loading.prepare import prepare
from pymllm.quantization import base
from pymllm.quantization.base import (
    QuantizationConfig,
    get_quantization_config,
    list_quantization_methods,
    register_quantization,
)
from pymllm.quantization.storage.settings import Settings, harmless

from ..checkpoints import FP8, relative_error, write_checkpoint
from ..forward import logits_of
from .published_configs import CONFIGS, OBJECTS_BY_NAME

ONLY_TARGETS = {
    "int2",
    "int3",
    "int4",
    "int5",
    "int6",
    "int8",
    "nvfp4",
}  # what rules make, and no checkpoint is stored in
NAMED_BY_LAYERS = {"mlx"}  # any name may be a layer's until the tensors are seen: test_mlx.py
UNKNOWN = "zz_unknown"
VALUES = ("x", 1, 0, 1.5, True, False, [1], ["x"], {"x": 1}, [{"x": 1}], {"x": None})
# Objects that are harmless as a whole: how the writer smoothed, and a scheme that no layer has.
UNREAD = {
    "quark: amd's FP8-KV": ("scaling_layers[0]",),
    "quark: by the type of layers": ("global_quant_config",),
}
EMPTY = (None, "", [], {})


def read(config):
    """What the config's format makes of it."""
    return get_quantization_config(config["quant_method"].replace("_", "-")).from_config(config)


def objects(value, path=()):
    """Every object in a config, with its path."""
    if isinstance(value, dict):
        yield path, value
        for name, item in value.items():
            yield from objects(item, (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from objects(item, (*path[:-1], f"{path[-1]}[{index}]"))


def at(config, path):
    """The object at a path that `objects` gave."""
    for part in path:
        name, _, rest = part.partition("[") if part.endswith("]") else (part, "", "")
        config = config[name]
        for index in rest.rstrip("]").split("][") if rest else ():
            config = config[int(index)]
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_what_writers_and_published_checkpoints_have_is_read(name):
    assert isinstance(read(CONFIGS[name]), QuantizationConfig)


def test_every_format_that_checkpoints_have_is_among_them():
    formats = {config["quant_method"].replace("_", "-") for config in CONFIGS.values()}
    assert formats >= set(list_quantization_methods()) - ONLY_TARGETS - NAMED_BY_LAYERS


@pytest.mark.parametrize("name", CONFIGS)
def test_an_unknown_setting_of_any_object_is_refused_by_its_path(name):
    for path, _ in objects(CONFIGS[name]):
        if any(part in UNREAD.get(name, ()) for part in path):
            continue
        by_name = ".".join(path) in OBJECTS_BY_NAME
        for value in VALUES[: -1 if by_name else None]:  # a layer whose settings are null says nothing
            config = copy.deepcopy(CONFIGS[name])
            at(config, path)[UNKNOWN] = value
            with pytest.raises(ConfigError) as caught:
                read(config)
            where = UNKNOWN if by_name else ".".join(("quantization_config", *path, UNKNOWN))
            assert where in str(caught.value), (path, value)
        for value in () if by_name else EMPTY:
            config = copy.deepcopy(CONFIGS[name])
            at(config, path)[UNKNOWN] = value
            read(config)


# --- settings that matter by their value

REFUSED = [
    ("awq: Qwen2.5-7B-Instruct-AWQ", "version", "gemv"),
    ("awq: GPTQModel 7.6.0", "format", "gemv_fast"),
    ("awq: GPTQModel 7.6.0", "dynamic", {"+:.*": {"group_size": 64}}),
    ("gptq: TheBloke's", "is_marlin_format", True),
    ("gptq: GPTQModel 7.6.0", "format", "gptq_v2"),
    ("gptq: GPTQModel 7.6.0", "method", "qqq"),
    ("gptq: GPTQModel 7.6.0", "rotation", "hadamard"),
    ("gptq: GPTQModel 7.6.0", "activation", "w4afp8"),
    ("gptq: GPTQModel 7.6.0", "meta.fallback.zz", 1),
    ("gptq: AutoRound 0.16.1", "act_bits", 8),
    ("gptq: AutoRound 0.16.1", "data_type", "mx_fp"),
    ("auto-round: Intel's", "super_bits", 6),
    ("auto-round: Intel's", "rotation_configs", [{"type": "hadamard"}]),
    ("auto-round: Intel's", "static_kv_dtype", "fp8"),
    ("bitsandbytes: unsloth's 4 bits", "llm_int8_has_fp16_weight", True),
    ("compressed-tensors: RedHatAI w4a16", "sparsity_config", {"format": "sparse-24-bitmask"}),
    ("compressed-tensors: RedHatAI w4a16", "config_groups.group_0.weights.dynamic", True),
    ("compressed-tensors: RedHatAI w4a16", "config_groups.group_0.weights.block_structure", [128, 128]),
    ("compressed-tensors: RedHatAI FP8-dynamic", "config_groups.group_0.weights.group_size", 128),
    ("compressed-tensors: RedHatAI FP8-dynamic", "config_groups.group_0.weights.actorder", "group"),
    ("compressed-tensors: RedHatAI FP8-dynamic", "attention_input_activations", {"num_bits": 8}),
    ("compressed-tensors: RedHatAI FP8-dynamic", "fp8_dtype_flavor", "float8_e4m3fnuz"),
    ("fp8: DeepSeek-V3", "fmt", "e5m2"),
    ("fp8: DeepSeek-V3", "expert_dtype", "fp4"),
    ("fp8: DeepSeek-V3", "weight_per_tensor", True),
    ("fp8: GPTQModel 7.6.0", "weight_scale_semantics", "squared"),
    ("fp8: GPTQModel 7.6.0", "dynamic", {"+:.*q_proj": {"weight_scale_method": "row"}}),
    ("hqq: transformers", "quant_config.weight_quant_params.axis", 0),
    ("modelopt: nvidia Llama-3.1-8B-Instruct-FP8", "quantization.has_zero_point", True),
    ("modelopt: nvidia Llama-3.1-8B-Instruct-FP8", "quantization.pre_quant_scale", True),
    ("modelopt: nvidia Llama-3.1-8B-Instruct-FP8", "quantization.lora_rank", 32),
    ("modelopt: config.json of nvidia's NVFP4", "config_groups.group_0.weights.type", "uint"),
    ("quark: amd's FP8-KV", "global_quant_config.weight.symmetric", False),
    ("quark: amd's FP8-KV", "global_quant_config.input_tensors.qscheme", "per_channel"),
    ("quark: amd's FP8-KV", "kv_cache_post_rope", True),
    ("quark: amd's FP8-KV", "softmax_quant_spec", {"dtype": "fp8_e4m3"}),
    ("quark: amd's FP8-KV", "algo_config", [{"name": "rotation", "r1": True, "r4": True}]),
    ("torchao: Float8DynamicActivationFloat8Weight", "quant_type.default._data.activation_value_ub", 5.0),
]


@pytest.mark.parametrize(
    ("name", "path", "value"), REFUSED, ids=[f"{n}: {p}={v}"[:70] for n, p, v in REFUSED]
)
def test_a_value_that_changes_the_meaning_is_refused_by_its_path(name, path, value):
    config = copy.deepcopy(CONFIGS[name])
    *parents, last = path.split(".")
    at(config, parents)[last] = value
    with pytest.raises(ConfigError) as caught:
        read(config)
    assert "quantization_config" in str(caught.value) and last in str(caught.value)
    at(config, parents)[last] = None
    if last not in ("version", "axis", "type", "is_marlin_format"):
        read(config)


def test_the_error_says_where_what_is_read_and_what_is_nearest(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", FP8())
    file = checkpoint.folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= {"activation_schema": "static", "other": {"x": 0}}
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        prepare(checkpoint.folder, device="cpu")
    error = caught.value
    assert error.code == "unknown-setting" and error.file == str(file)
    assert error.tensor == "quantization_config.activation_schema" and error.found == "'static'"
    assert "weight_block_size" in error.expected and "Nearest: activation_scheme" in error.fix
    assert "quantization_config.other {'x': 0}" in str(error)


def test_a_file_beside_the_config_is_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", FP8())
    config = json.loads((checkpoint.folder / "config.json").read_text())
    del config["quantization_config"]
    (checkpoint.folder / "config.json").write_text(json.dumps(config))
    settings = {"quantization": {"quant_algo": "FP8", "smoothing": 0.5}}
    (checkpoint.folder / "hf_quant_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError) as caught:
        prepare(checkpoint.folder, device="cpu")
    assert caught.value.file.endswith("hf_quant_config.json")
    assert caught.value.tensor == "quantization.smoothing"
    settings["quantization"] = {"quant_algo": "FP9"}
    (checkpoint.folder / "hf_quant_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="FP9") as caught:
        prepare(checkpoint.folder, device="cpu")
    assert caught.value.file.endswith("hf_quant_config.json") and caught.value.tensor == "quant_algo"


def test_settings_that_a_format_keeps_in_tensors_and_metadata_are_read_as_strictly():
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 64], "offset": 0.5}
    name = "model.layer.weight.quant_state.bitsandbytes__nf4"
    raw = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors = {name: raw, "model.layer.weight": torch.zeros(128, 1, dtype=torch.uint8)}
    tensors["model.layer.weight.quant_map"] = torch.linspace(-1, 1, 16)
    config = read(CONFIGS["bitsandbytes: unsloth's 4 bits"])
    with pytest.raises(ConfigError) as caught:
        config.see_checkpoint(tensors)
    assert caught.value.tensor == f"{name}.offset"

    config = read(CONFIGS["torchao: Int8WeightOnly"])
    attributes = {
        "block_size": [1, 8],
        "dtype": {"_type": "torch.dtype", "_data": "float32"},
        "transposed": True,
    }
    text = json.dumps({"_type": "Int8Tensor", "_data": attributes, "_tensor_data_names": ["qdata", "scale"]})
    config.metadata["model.layer.weight"] = text
    config.see_checkpoint(
        {
            "model.layer._weight_qdata": torch.zeros(4, 8, dtype=torch.int8),
            "model.layer._weight_scale": torch.ones(4, 1),
        }
    )
    with pytest.raises(ConfigError) as caught:
        config.get_quant_method(SimpleNamespace(kind="linear"), "model.layer")
    assert caught.value.tensor == "model.layer.weight._data.transposed"
    del attributes["transposed"]
    text = json.dumps({"_type": "Int8Tensor", "_data": attributes, "_tensor_data_names": ["qdata", "scale"]})
    config.metadata["model.layer.weight"] = text
    assert config.get_quant_method(SimpleNamespace(kind="linear"), "model.layer").bits == 8


@pytest.mark.parametrize(
    ("setting", "value", "found"),
    [
        ("logits_scaling", 8.0, "logits_scaling"),
        ("sliding_window", 7, "sliding_window"),
        ("is_causal", False, "is_causal"),
        ("use_bidirectional_attention", True, "use_bidirectional_attention"),
        ("attention_multiplier", 0.01, "attention_multiplier"),
        ("final_logit_softcapping", 30.0, "final_logit_softcapping"),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0, "beta": 0.1}, "rope_parameters.beta"),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, "rope_scaling.rope_type"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "turns": 0}, "rope_parameters.turns"),
    ],
)
def test_a_setting_of_the_model_that_it_does_not_compute_with_is_refused(tmp_path, setting, value, found):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", FP8())
    file = checkpoint.folder / "config.json"
    config = json.loads(file.read_text())
    if found == "rope_parameters.beta":  # otherwise both are there, and differ
        del config["rope_parameters"]
    file.write_text(json.dumps(config | {setting: value}))
    with pytest.raises(ConfigError) as caught:
        prepare(checkpoint.folder, device="cpu")
    assert caught.value.code == "config-ignored" and caught.value.tensor == found
    neutral = {"is_causal": True, "attn_logit_softcapping": 0, "sliding_window": 4096}
    neutral |= {"logits_scaling": 1.0, "rope_scaling": {"rope_type": "default", "beta": None}}
    file.write_text(json.dumps(config | {setting: neutral.get(setting)}))
    prepare(checkpoint.folder, device="cpu")


PAGES = Path(__file__).parents[2] / "quantization"
FOLDERS = {"auto-round": "gptq", "compressed-tensors": "compressed_tensors"}


@pytest.mark.parametrize(
    "name", sorted({config["quant_method"].replace("_", "-") for config in CONFIGS.values()})
)
def test_the_page_of_a_format_lists_what_it_leaves_unread(name):
    settings = get_quantization_config(name).harmless
    if not settings:
        return
    folders = (FOLDERS.get(name, name), "kv_cache", ".")
    text = "".join((PAGES / folder / "README.md").read_text() for folder in folders)
    listed = {entry.rpartition(".")[2] for entry in re.findall(r"`([^`\n]+)`", text)}
    assert [path for path in settings if path.rpartition(".")[2] not in listed] == []


# --- the mechanism


class Forgetful(QuantizationConfig):
    @classmethod
    def get_name(cls):
        return "forgetful"

    @classmethod
    def from_config(cls, config):
        config.get("bits")
        return cls()

    def get_quant_method(self, layer, prefix):
        return None


class Heir(Forgetful):
    harmless = harmless("a note", "note", only=(1,))

    @classmethod
    def from_config(cls, config):
        super().from_config(config)
        config.get("group_size")
        return cls()


def test_a_format_cannot_forget_a_setting(monkeypatch):
    list_quantization_methods()
    monkeypatch.setattr(base, "_registry", dict(base._registry))
    register_quantization("forgetful")(Forgetful)
    found = get_quantization_config("forgetful")
    assert isinstance(found.from_config({"quant_method": "forgetful", "bits": 4}), Forgetful)
    with pytest.raises(ConfigError, match=r"quantization_config\.group_size"):
        found.from_config({"bits": 4, "group_size": 128})


def test_a_format_that_asks_its_base_class_is_checked_once_it_is_done():
    assert isinstance(Heir.from_config({"bits": 4, "group_size": 8, "note": 1}), Heir)
    with pytest.raises(
        ConfigError, match=r"quantization_config\.note True cannot be read; expected 1: a note"
    ):
        Heir.from_config({"note": True})


def test_to_ask_for_a_name_is_not_to_read_it_and_a_copy_is_refused():
    settings = Settings({"a": 1, "b": {"c": 2}})
    assert "a" in settings and "z" not in settings and len(settings) == 2 and settings
    with pytest.raises(ConfigError, match=r"quantization_config\.a"):
        settings.refuse_unread("X", {})
    for copied in (dict, lambda it: {**it}):
        with pytest.raises(TypeError, match="with_defaults"):
            copied(settings)
    assert settings == {"a": 1, "b": {"c": 2}} and repr(settings) == "{'a': 1, 'b': {'c': 2}}"


def test_what_is_read_through_defaults_or_items_counts():
    settings = Settings({"a": 1, "b": [{"c": 2}, 3]})
    filled = settings.with_defaults(a=5, d=6)
    assert (filled["a"], filled["d"], filled["b"][0]["c"]) == (1, 6, 2)
    settings.refuse_unread("X", {})
    named = Settings({"layers": {"x": {"bits": 4, "e": 0}}})
    assert [layer["bits"] for _, layer in named["layers"].items()] == [4]
    with pytest.raises(ConfigError, match=r"quantization_config\.layers\.x\.e"):
        named.refuse_unread("X", {})


# --- scales that codes are divided by, as GPTQModel writes FP8


class Inverse(FP8):
    """FP8 whose stored scale is the factor that weights were multiplied by; `rows`: one for each output, flat."""

    rows = False

    def encode(self, weight):
        if not self.rows:
            tensors, meant = super().encode(weight)
            return tensors | {"weight_scale_inv": tensors["weight_scale_inv"].reciprocal()}, meant
        factors = 448 / weight.float().abs().amax(1)
        codes = (weight.float() * factors[:, None]).to(torch.float8_e4m3fn)
        meant = (codes.double() / factors.double()[:, None]).float()
        return {"weight": codes, "weight_scale_inv": factors}, meant

    def config(self, *arguments):
        rows = {"weight_block_size": None, "weight_scale_method": "row"} if self.rows else {}
        return super().config(*arguments) | rows | {"weight_scale_semantics": "inverse"}


class InverseRows(Inverse):
    rows = True


@pytest.mark.parametrize("scheme", (Inverse, InverseRows))
def test_codes_are_divided_by_inverse_scales(tmp_path, scheme):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", scheme())
    model = pymllm.load_model(checkpoint.folder, dtype="float32", device="cpu")
    assert relative_error(logits_of(model, checkpoint.ids), checkpoint.logits()) <= 1e-5
    assert verify(checkpoint.folder, device="cpu").ok
