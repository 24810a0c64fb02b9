"""Rules for a choice: each layer gets its method by exactly one of them."""

from __future__ import annotations

import pytest

from pymllm.quantization.rules import Rule
from pymllm.searching.methods import split_methods
from pymllm.searching.rules_file import write_rules

PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "mlp.down_proj",
    "mlp.experts.0.up_proj",
    "mlp.experts.1.up_proj",
)


def names(layers: int) -> list[str]:
    return [f"model.layers.{i}.{part}" for i in range(layers) for part in PARTS]


@pytest.mark.parametrize("period", [1, 2, 3, 5])
def test_each_layer_is_matched_by_one_rule_alone(period):
    methods = {"model.embed_tokens": "int8", "lm_head": "int8"}
    for place, name in enumerate(names(12)):
        layer = place // len(PARTS)
        attention = "self_attn" in name
        which = (layer + attention) % period
        methods[name] = ("int4:group_size=64", "stored", "int3", "none", "int6")[which]
    rules = [Rule.parse(line) for line in write_rules(methods)]
    for name, method in methods.items():
        matching = [str(rule) for rule in rules if rule.matches(name)]
        assert [text.rpartition(f"={method}")[1] for text in matching] == (
            [] if method == "stored" else [f"={method}"]
        )
    for other in ("model.norm", "model.layers.3.mlp.gate", "model.layers.31.mlp.down_proj.x", "xlm_head"):
        assert not any(rule.matches(other) for rule in rules)


def test_layers_that_agree_share_a_glob():
    methods = {f"model.layers.{i}.mlp.down_proj": "int4" for i in range(30)}
    assert write_rules(methods) == ["model.layers.*.mlp.down_proj=int4"]


def test_methods_are_told_from_their_options():
    assert split_methods("int4:group_size=64,scale=mse,int8, none") == [
        "int4:group_size=64,scale=mse",
        "int8",
        "none",
    ]
