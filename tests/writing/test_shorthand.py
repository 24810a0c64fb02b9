"""A method for the whole model: the rules that it stands for, and runs of it that are stopped."""

from __future__ import annotations

import pytest

import pymllm
from pymllm.api import shipped_model
from pymllm.cli import main
from pymllm.errors import ConfigError
from pymllm.loading.prepare import Prepared, prepare
from pymllm.parallel import Parallel
from pymllm.writing import checkpoint_writer
from pymllm.writing.quantize_checkpoint import expand_rules
from pymllm.writing.shorthand import expand

from ..checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), "llama", "none").folder


def targets(folder, rules) -> dict[str, str]:
    return {layer.prefix: layer.method for layer in pymllm.plan(folder, rules).weighted_layers}


def test_a_method_alone_is_for_the_layers_of_all_blocks_and_no_other(folder):
    found = expand_rules(folder, "out", "int8")
    for name, method in targets(folder, found.rules).items():
        assert method == ("int8" if ".layers." in name else "none"), name
    assert "int8 for 14 layers (model.layers.**)" in found.said
    assert "model.embed_tokens" in found.said and "lm_head" in found.said


def test_rules_come_first_and_the_method_takes_what_they_leave(folder):
    rules = expand_rules(folder, "out", ["**.mlp.**=fp8", "lm_head=int8", "int4:group_size=32"]).rules
    chosen = targets(folder, rules)
    assert chosen["model.layers.0.mlp.up_proj"] == "fp8" and chosen["lm_head"] == "int8"
    assert chosen["model.layers.1.self_attn.q_proj"] == "int4" and chosen["model.embed_tokens"] == "none"
    with pytest.raises(ConfigError, match="left with no layer"):
        expand_rules(folder, "out", ["**=fp8", "int4"])
    with pytest.raises(ConfigError, match="two methods"):
        expand_rules(folder, "out", ["int8", "int4"])


def test_groups_that_do_not_divide_the_inputs_become_smaller_unless_they_were_asked_for(tmp_path):
    narrow = write_checkpoint(tmp_path, "llama", "none", intermediate_size=192).folder
    found = expand_rules(narrow, "out", "int4")
    assert found.rules == ["model.layers.**=int4:group_size=64"] and "smaller groups" in found.said
    asked = expand_rules(narrow, "out", "int4:group_size=128").rules
    assert asked == ["model.layers.**=int4:group_size=128"]


@pytest.mark.parametrize(
    ("method", "out", "words"),
    [
        ("int44", "out", "Nearest: int4"),
        ("Q4_K_X", "out.gguf", "Nearest: Q4_K_S, Q4_K_M"),
        ("Q4_K_M", "out", "ends in .gguf"),
        ("bitsandbytes", "out", "no method 'bitsandbytes'"),
    ],
)
def test_a_method_that_is_none_has_one_error(folder, method, out, words):
    with pytest.raises(ConfigError, match=words):
        expand_rules(folder, out, method)


def test_a_mixture_gives_each_tensor_the_type_that_llama_quantize_gives_it():
    """llama.cpp's use_more_bits takes the first and the last eighth of the layers, and every third between."""
    with Parallel():
        prepared: Prepared = prepare(shipped_model(), device="cpu", dtype="float32", compute="exact")
    layers = prepared.config.size("num_hidden_layers")
    rules = dict(
        rule.split("=", 1)
        for rule in expand(prepared, "q4_k_m", [], prepared.checkpoint.path / "x.gguf").rules
    )
    more = {i for i in range(layers) if i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2}
    assert {
        int(name.split(".")[2]) for name in rules if name.split(".")[2:3] != ["*"] and "v_proj" in name
    } == more
    assert rules["model.layers.*.self_attn.v_proj"] == "gguf:type=Q4_K"
    assert rules["model.layers.2.mlp.down_proj"] == "gguf:type=Q6_K"
    assert rules["model.embed_tokens"] == rules["lm_head"] == "gguf:type=Q6_K"  # one table


def test_a_stopped_run_says_how_far_it_came_and_goes_on(folder, tmp_path, capsys, monkeypatch):
    out, make = tmp_path / "out", checkpoint_writer.CheckpointWriter._make

    def stopping(self, step):
        if step.name == "model.layers.1":
            raise KeyboardInterrupt
        return make(self, step)

    arguments = ["quantize", str(folder), str(out), "int8"]
    monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "_make", stopping)
    assert main(arguments) == 130
    text = capsys.readouterr().err
    assert "Stopped: 2 of " in text and "The same command goes on from there" in text
    monkeypatch.undo()
    assert main(arguments) == 0
    assert pymllm.plan(out).layer("model.layers.1.mlp.up_proj").method == "compressed-tensors"


def test_the_command_wants_a_method_or_rules_and_no_pattern_in_the_method(tmp_path, capsys):
    for words in ([], ["**.mlp.**=int4"]):
        assert main(["quantize", "model", str(tmp_path / "out"), *words]) == 2
        assert "METHOD" in capsys.readouterr().err
