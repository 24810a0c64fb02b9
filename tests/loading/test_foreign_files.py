"""Files of a checkpoint that are wrong in kind, size or place: one error of ours, from headers alone."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from pymllm.engine.sampling import recommended_settings
from pymllm.errors import LISTED, CheckpointError, ConfigError, PymllmError, escaped
from pymllm.loading import load
from pymllm.loading.boundary import reading_checkpoint
from pymllm.loading.prepare import prepare
from pymllm.moe.config import get_num_experts_per_tok
from pymllm.text.encoders import AutoEncoder
from pymllm.text.json_files import read_json
from pymllm.text.template_files import read_templates
from pymllm.text.tokenizer import Tokenizer
from pymllm.weights import gguf_config
from pymllm.weights.json_text import MAX_DEPTH, parse_json, parse_json_object
from pymllm.weights.links import check_link

from ..checkpoints import edit_config
from ..gguf_models import write_model
from .refusal import refused

# JSON

BAD_JSON = {
    "mark": b"\xef\xbb\xbf{}",
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "latin": b'{"\xe9": 1}',
    "twice": b'{"a": 1, "a": 1}',
    "twice below": b'{"b": [{"a": 1, "a": 2}]}',
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "few more digits": b'{"a": -' + b"9" * 41 + b"}",
    "lists": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep": b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
    "objects": b'{"a": ' + b'{"a": ' * 100 + b"1" + b"}" * 101,
    "list": b"[]",
    "null": b"null",
    "nothing": b"",
    "cut off": b'{"a": 1',
    "more": b"{}{}",
}


@pytest.mark.parametrize("raw", BAD_JSON.values(), ids=BAD_JSON)
@pytest.mark.parametrize(
    "name",
    (
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "quant_config.json",
        "chat_template.json",
    ),
)
def test_every_json_file_is_read_strictly_and_in_bounds(folder, reads, name, raw):
    (folder / name).write_bytes(raw)
    if name in ("tokenizer_config.json", "chat_template.json"):
        with pytest.raises(CheckpointError) as caught:
            read_json(folder / name)
    else:
        with pytest.raises(CheckpointError) as caught:
            prepare(folder, device="cpu")
    error = caught.value
    assert str(folder / name) in str(error) and str(error).isprintable() and len(str(error)) < 600
    assert reads == []


def test_json_at_the_bounds_is_read(tmp_path):
    deep = b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1)
    text = b'{"a": %s, "b": -%s, "c": "\\ud800", "d": 1e999}' % (deep, b"9" * 40)
    found = parse_json_object(text, tmp_path, "config")
    assert found["b"] == -int("9" * 40) and found["c"] == "\ud800"
    assert parse_json(b"[1]", tmp_path, "config") == [1]
    with pytest.raises(CheckpointError, match="NaN is not JSON"):
        parse_json(b'{"a": NaN}', tmp_path, "config")


# Links, and what is no file

PLACES = ("config.json", "model.safetensors", "generation_config.json", "quant_config.json")


@pytest.mark.parametrize("name", PLACES)
def test_a_link_out_of_the_folder_is_not_followed(folder, reads, tmp_path, name):
    outside = tmp_path / "outside"
    shutil.copy(folder / name, outside) if (folder / name).exists() else outside.write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    error = refused(folder, reads)
    assert error.code == "link-escapes" and name in str(error) and str(outside) in str(error)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("kind", ("fifo", "folder", "device", "loop", "dangling"))
def test_what_is_no_regular_file_is_never_waited_for(folder, reads, name, kind):
    file = folder / name
    file.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to({"device": "/dev/zero", "loop": name, "dangling": "nowhere"}[kind])
    codes = ("not-regular", "symlink-loop", "not-found", "link-escapes", "unreadable", "weights-missing")
    assert refused(folder, reads).code in codes


def test_links_within_the_folder_and_to_the_folder_are_followed(folder, tmp_path):
    (folder / "config.json").rename(folder / "own.json")
    (folder / "config.json").symlink_to("own.json")
    (tmp_path / "named").symlink_to(folder)
    assert prepare(tmp_path / "named", device="cpu").units


def test_links_of_the_hub_cache_lead_to_its_files_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model, other = tmp_path / "hub/models--a--b", tmp_path / "other/models--a--b"
    for repository in (model, other):
        (repository / "blobs").mkdir(parents=True)
        (repository / "blobs/1").write_text("{}")
    (model / "snapshots/0/1_Pooling").mkdir(parents=True)
    own = model / "snapshots/0/1_Pooling/config.json"
    own.symlink_to("../../../blobs/1")
    check_link(own)
    (tmp_path / "named").symlink_to(model / "snapshots/0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another hub"))
    check_link(tmp_path / "named/1_Pooling/config.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    older = tmp_path / "model/config.json"  # as earlier versions of the client filled a folder
    older.parent.mkdir()
    older.symlink_to(model / "blobs/1")
    check_link(older)
    for target in (other / "blobs/1", model / "snapshots"):
        older.unlink()
        older.symlink_to(target)
        with pytest.raises(CheckpointError, match="leads out of its folder"):
            check_link(older)


def test_a_chat_template_that_is_no_file_is_not_passed_over(folder):
    os.mkfifo(folder / "chat_template.jinja")
    with pytest.raises(CheckpointError, match="regular"):
        read_templates(folder, {"chat_template": "x"})


# Values


@pytest.mark.parametrize(
    "name, values",
    {
        "rms_norm_eps": (0.0, -1e-5, 1.5, 1e308, True, "1e-5", [1e-5]),
        "rope_parameters": (
            {"rope_theta": 0.5},
            {"rope_theta": 1e308},
            {"rope_type": "linear", "factor": 1e308},
        ),
        "rope_scaling": ({"rope_type": "linear", "factor": float("nan")},),
        "partial_rotary_factor": (1e308, 1.5),
        "num_key_value_heads": (3, 4.0, 2**63),
        "hidden_size": (2**40, 128.0, 10**39),
        "max_position_embeddings": (1e5, "128"),
        "hidden_act": ({}, ["silu"], 3),
        "attention_bias": ("False", 0),
        "eos_token_id": ({}, 1.0, -1, True, [[1]], [1, "x"], "2", [1, None], float("inf")),
    }.items(),
)
def test_a_value_of_another_kind_or_out_of_range_is_named(folder, reads, name, values):
    raw = json.loads((folder / "config.json").read_text())
    for value in values:
        changed = {
            key: one for key, one in raw.items() if not (name == "rope_scaling" and key == "rope_parameters")
        }
        (folder / "config.json").write_text(json.dumps({**changed, name: value}))
        error = refused(folder, reads, PymllmError)
        part = next(iter(value), name) if isinstance(value, dict) and value else name
        assert str(folder) in str(error), value
        assert any(word in str(error) for word in (name, part, "factor", "rope_theta")), (value, str(error))


@pytest.mark.parametrize("value", ({}, 1.0, -1, [[1]], [2, "x"], "2"), ids=repr)
def test_ends_of_a_text_in_the_generation_config_are_ids(folder, reads, value):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    error = refused(folder, reads, ConfigError)
    assert (error.code, error.tensor) == ("config-value", "eos_token_id")
    assert error.file.endswith("generation_config.json")


@pytest.mark.parametrize("name, value", (("temperature", "x"), ("top_p", 2.0), ("top_k", 1.5), ("min_p", [])))
def test_recommended_sampling_that_cannot_be_is_the_files_fault(name, value):
    assert recommended_settings({name: value}, (), "g.json") == {}  # without do_sample nothing is sampled
    with pytest.raises(ConfigError, match=rf"g\.json.*{name}"):
        recommended_settings({"do_sample": True, name: value}, (), "g.json")


def test_experts_of_a_token_are_among_those_of_the_layer():
    class Config:
        num_experts = 4
        num_experts_per_tok = 5

    for value in (5, 0, 1.0, True, "2"):
        Config.num_experts_per_tok = value
        with pytest.raises(ConfigError, match="num_experts_per_tok"):
            get_num_experts_per_tok(Config)


@pytest.mark.parametrize("value", (2**40, 10**6), ids=("2^40", "10^6"))
def test_more_layers_than_any_model_has_are_refused_before_transformers_lists_them(folder, reads, value):
    edit_config(folder, model_type="starcoder2", architectures=None, num_hidden_layers=value)
    assert "num_hidden_layers" in str(refused(folder, reads, PymllmError))


# GGUF


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_model(path, "gemma3_text", num_hidden_layers=1)
    return path


def test_every_setting_of_a_gguf_file_with_values_of_all_kinds(gguf_file, monkeypatch):
    import numpy as np

    from pymllm.weights.gguf_file import GGUFFile

    found = GGUFFile.open(gguf_file).metadata
    values = (
        *(0, 3, 2**32 - 1, 2**64 - 1, -1, 8.0, float("nan"), float("inf"), 1e308, True, "", "x\x1b", []),
        *(["a"], np.zeros(0, "u4"), np.array([1, 2], "u4"), np.array([np.nan], "f4"), np.array([True])),
    )
    keys, real = [key for key in found if key.startswith("gemma3.")], gguf_config.ConfigReader.read
    assert len(keys) > 8
    for key in keys:
        for value in values:

            def read(self, tensors, key=key, value=value):
                self.metadata[key] = value
                return real(self, tensors)

            monkeypatch.setattr(gguf_config.ConfigReader, "read", read)
            try:
                prepare(gguf_file, device="cpu")
            except PymllmError as error:
                assert error.code != "unforeseen", (key, value, str(error))
                assert str(error).replace(LISTED, "").isprintable()


# What is shown

HOSTILE = "\x1b[2J\x9b31m\u202egpj\u200b\ud800\n\tx\x07"


def test_every_part_of_an_error_is_escaped_by_one_rule():
    error = CheckpointError(
        f"m {HOSTILE}",
        code="x",
        file=f"f{HOSTILE}",
        tensor=f"t{HOSTILE}",
        expected=HOSTILE,
        found=HOSTILE,
        fix=f"{HOSTILE}.",
        brief=HOSTILE,
    )
    for text in (str(error), error.shortened(), error.args[0]):
        assert text.isprintable() and text.count(r"\x1b[2J\x9b31m\u202egpj\u200b\ud800\n\tx\x07") >= 6
    listed = CheckpointError("two problems:\n  a\nb\n  c", code="x")
    assert str(listed) == "two problems:\n  a\\nb\n  c."
    assert escaped("\u00fcber \u65e5\u672c\n", "\n") == "\u00fcber \u65e5\u672c\n"


# The last resort


def test_what_nobody_foresaw_is_one_error_with_its_cause_and_place(folder, monkeypatch):
    def fail(*_):
        return {}["key"]

    monkeypatch.setattr(load, "check_skipped", fail)
    monkeypatch.setattr("pymllm.loading.prepare.read_quantization_config", fail)
    with pytest.raises(CheckpointError) as caught:
        prepare(folder, device="cpu")
    error = caught.value
    assert error.code == "unforeseen" and isinstance(error.__cause__, KeyError)
    assert "KeyError" in str(error) and "loading/prepare.py:" in str(error) and "report this" in str(error)


@pytest.mark.parametrize("error", (KeyboardInterrupt, SystemExit, OSError))
def test_what_is_not_the_files_fault_stays_what_it_is(tmp_path, error):
    with pytest.raises(error), reading_checkpoint(tmp_path):
        raise error


@pytest.mark.parametrize(
    "error", (MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("can't allocate memory: 5"))
)
def test_want_of_memory_is_said(tmp_path, error):
    with pytest.raises(CheckpointError, match="not enough memory") as caught, reading_checkpoint(tmp_path):
        raise error
    assert caught.value.code == "out-of-memory" and caught.value.__cause__ is error


def test_a_folder_of_chat_templates_leads_nowhere_else(folder, tmp_path):
    elsewhere, further = tmp_path / "elsewhere", folder / "additional_chat_templates"
    elsewhere.mkdir()
    (elsewhere / "default.jinja").write_text("x")
    further.symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        read_templates(folder, {})
    further.unlink()
    further.mkdir()
    (further / "default.jinja").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="cannot read the file"):
        read_templates(folder, {})


@pytest.mark.parametrize("name", ("vocab.txt", "added_tokens.json", "additional_chat_templates"))
def test_transformers_is_given_no_link_out_of_the_folder(tmp_path, name):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    folder.mkdir()
    (folder / "vocab.txt").write_text("[UNK]")
    (folder / name).unlink(missing_ok=True)
    outside.mkdir() if "." not in name else outside.write_text("{}")
    (folder / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        AutoEncoder(folder)


@pytest.mark.parametrize("kind", ("fifo", "dangling"))
def test_a_tokenizer_that_is_no_file_is_not_passed_over(tmp_path, kind):
    (tmp_path / "vocab.txt").write_text("[UNK]\n")  # which would be read in its place
    file = tmp_path / "tokenizer.json"
    os.mkfifo(file) if kind == "fifo" else file.symlink_to("nowhere")
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(tmp_path).encode("a")
    assert caught.value.code in ("not-regular", "not-found") and caught.value.file == str(file)
