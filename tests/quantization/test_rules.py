"""Rules: how they are read, what they match, which one wins, and what is reported of those that cannot hold."""

from __future__ import annotations

import contextlib

import pytest
import torch

from pymllm.api import load_model
from pymllm.errors import CheckpointError, ConfigError, RuleError
from pymllm.layers.split import SplitLinearMethod
from pymllm.loading.prepare import prepare
from pymllm.quantization import base
from pymllm.quantization.base import (
    QuantizationConfig,
    get_quantization_config,
    list_quantization_methods,
    register_quantization,
)
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.rules import Rule, nearest_pattern, read_rules

from ..checkpoints import AWQ, edit_config, random_model, relative_error, save_tensors, write_checkpoint
from ..forward import logits_of

# --- reading


@pytest.mark.parametrize(
    "text, pattern, method, options",
    (
        ("a.b=fp8", "a.b", "fp8", {}),
        ("  **.mlp.**=fp8 ", "**.mlp.**", "fp8", {}),
        ("lm_head=fp8:granularity=block", "lm_head", "fp8", {"granularity": "block"}),
        ("x=awq:group_size=64,zero_point=false", "x", "awq", {"group_size": "64", "zero_point": "false"}),
        ("x=awq: group_size = 64 ,", "x", "awq", {"group_size": "64"}),
        ("re:model\\.layers\\.\\d+\\..*=none", "re:model\\.layers\\.\\d+\\..*", "none", {}),
        ("x=compressed-tensors", "x", "compressed-tensors", {}),
    ),
)
def test_a_rule_is_pattern_method_and_options(text, pattern, method, options):
    rule = Rule.parse(text)
    assert (rule.pattern, rule.method, dict(rule.options)) == (pattern, method, options)
    assert Rule.parse(str(rule)) == rule


@pytest.mark.parametrize(
    "text", ("", "fp8", "a.b", "=fp8", "a.b=", "a=8bit!", "a=fp8:x", "a=fp8:=", "re:(=fp8", "re:*x=fp8")
)
def test_what_is_no_rule_is_refused_and_quoted(text):
    with pytest.raises(RuleError) as caught:
        Rule.parse(text)
    assert caught.value.code == "rule-syntax" and (text.partition("=")[0] in str(caught.value))


def test_rules_come_from_a_line_a_list_a_mapping_or_a_file(tmp_path):
    expected = (Rule("a", "fp8"), Rule("b.**", "none"))
    file = tmp_path / "rules.txt"
    file.write_text("# comment\n\na=fp8\n  # indented comment\nb.**=none\n")
    assert read_rules(["a=fp8", "b.**=none"]) == expected
    assert read_rules({"a": "fp8", "b.**": "none"}) == expected
    assert read_rules(file) == read_rules(f"@{file}") == read_rules([f"@{file}"]) == expected
    assert read_rules("a=fp8") == expected[:1]
    assert read_rules(None) == ()


def test_a_file_of_rules_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "absent", tmp_path / "binary", tmp_path):
        with pytest.raises(RuleError) as caught:
            read_rules(path)
        assert caught.value.code == "rule-file" and str(path) in str(caught.value)


# --- matching

GATE = "model.layers.3.mlp.gate_proj"


@pytest.mark.parametrize(
    "pattern, name, matches",
    (
        # Exact: whole names only.
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", False),
        ("model.layers.3.mlp", GATE, False),
        ("gate_proj", GATE, False),
        # "*" stays within a segment.
        ("model.layers.*.mlp.gate_proj", GATE, True),
        ("model.layers.*.gate_proj", GATE, False),
        ("*.gate_proj", GATE, False),
        ("model.layers.*.mlp.*_proj", GATE, True),
        ("model.layers.*.mlp.gate*", GATE, True),
        ("model.layers.1*.mlp.gate_proj", "model.layers.1.mlp.gate_proj", True),
        ("model.layers.1*.mlp.gate_proj", "model.layers.12.mlp.gate_proj", True),
        ("model.layers.?.mlp.gate_proj", "model.layers.12.mlp.gate_proj", False),
        ("model.layers.?.mlp.gate_proj", GATE, True),
        # "**" is any number of whole segments, none too.
        ("**.mlp.**", GATE, True),
        ("**.mlp.**", "mlp.gate_proj", True),
        ("**.mlp.**", "model.layers.3.mlp", True),
        ("**.mlp.**", "model.layers.3.mlp2.gate_proj", False),
        ("**.mlp.**", "model.layers.3.xmlp.gate_proj", False),
        ("**.gate_proj", GATE, True),
        ("**.gate_proj", "gate_proj", True),
        ("**.gate_proj", "model.up_gate_proj", False),
        ("model.**.gate_proj", GATE, True),
        ("model.**.gate_proj", "model.gate_proj", True),
        ("model.layers.3.**", GATE, True),
        ("model.layers.3.**", "model.layers.30.mlp.gate_proj", False),
        ("**", GATE, True),
        ("**", "lm_head", True),
        # What is special in regular expressions is not in a glob.
        ("model.layers.3.mlp.gate_proj", "modelxlayersx3xmlpxgate_proj", False),
        ("a+b", "aab", False),
        ("a[0-9]", "a1", False),
        # "re:" is one, over the whole name.
        (r"re:model\.layers\.[0-4]\..*", GATE, True),
        (r"re:layers", GATE, False),
        (r"re:.*gate_proj", GATE, True),
        (r"re:.*gate", GATE, False),
    ),
)
def test_patterns_match_whole_names_by_whole_segments(pattern, name, matches):
    assert Rule(pattern, "none").matches(name) is matches


# --- deciding


@pytest.fixture(scope="module")
def awq(tmp_path_factory):
    """An AWQ checkpoint of two layers."""
    return write_checkpoint(tmp_path_factory.mktemp("awq"), "llama", AWQ(64))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("plain"), "llama")


def decisions(checkpoint, rules):
    return prepare(checkpoint.folder, rules, device="cpu").quant.decisions


def test_every_layer_is_decided_by_its_checkpoint_name(awq):
    names = set(decisions(awq, None))
    assert names == {*awq.linears, "model.embed_tokens", "lm_head"}


def test_the_first_rule_that_matches_wins(awq):
    rules = [
        "**.layers.0.mlp.up_proj=none",
        "**.layers.0.**=fp8",
        "**.layers.**=awq:group_size=32",
        "**=none",
    ]
    found = decisions(awq, rules)
    assert str(found["model.layers.0.mlp.up_proj"].rule) == "**.layers.0.mlp.up_proj=none"
    assert str(found["model.layers.0.self_attn.q_proj"].rule) == "**.layers.0.**=fp8"
    assert str(found["model.layers.1.self_attn.q_proj"].rule) == "**.layers.**=awq:group_size=32"
    assert {found[name].source for name in found} == {"rule"}


def test_without_a_rule_the_checkpoint_decides_and_says_so(awq, plain):
    found = decisions(awq, "**.mlp.**=none")
    q_proj, head = found["model.layers.0.self_attn.q_proj"], found["lm_head"]
    assert (q_proj.method.name, q_proj.source, q_proj.rule) == ("awq", "quantization_config", None)
    assert (head.method.name, head.source) == ("none", "quantization_config leaves it out")
    assert decisions(plain, None)["lm_head"].source == "checkpoint is not quantised"


def test_a_rule_that_asks_for_what_is_there_converts_nothing(awq):
    found = decisions(awq, "**.mlp.**=awq")
    assert found["model.layers.0.mlp.up_proj"].method.describe() == "awq int4 g64"
    assert (
        decisions(awq, "**.mlp.**=awq:group_size=64")["model.layers.0.mlp.up_proj"].method
        == found["model.layers.0.mlp.up_proj"].method
    )


def test_options_reach_the_method(plain):
    def method(rule):
        return decisions(plain, f"lm_head={rule}")["lm_head"].method.describe()

    assert method("fp8:granularity=tensor").startswith("fp8 e4m3 per tensor")
    assert method("fp8:granularity=block").startswith("fp8 e4m3 per block 128x128")
    assert method("fp8").startswith("fp8 e4m3 per channel")
    assert method("fp8:activations=float").startswith("fp8 e4m3 per channel, activations float")
    rows = decisions(plain, "**.mlp.**=awq:group_size=-1,zero_point=false")["model.layers.0.mlp.up_proj"]
    assert rows.method.describe().startswith("awq int4 whole rows sym")


# --- what cannot be meant


def test_a_rule_that_matches_nothing_is_an_error_with_the_nearest_names(awq):
    with pytest.raises(RuleError) as caught:
        prepare(awq.folder, "model.layers.0.mlp.gate_porj=none", device="cpu")
    assert caught.value.code == "rule-unmatched"
    assert "gate_porj=none" in str(caught.value) and "Nearest: model.layers.0.mlp.gate_proj" in str(
        caught.value
    )
    with pytest.raises(RuleError, match=r"Nearest: .*gate_proj"):
        prepare(awq.folder, "**.gate_porj=none", device="cpu")


def test_a_rule_that_names_a_module_around_layers_says_how_to_reach_them(awq):
    with pytest.raises(RuleError, match=r"'model.layers.0.mlp.\*\*'"):
        prepare(awq.folder, "model.layers.0.mlp=none", device="cpu")


def test_fused_names_are_not_checkpoint_names(awq):
    with pytest.raises(RuleError) as caught:
        prepare(awq.folder, "**.gate_up_proj=none", device="cpu")
    assert caught.value.code == "rule-unmatched"


def test_a_rule_that_never_comes_first_is_an_error_that_names_the_earlier_one(awq):
    with pytest.raises(RuleError) as caught:
        prepare(awq.folder, ["**.mlp.**=fp8", "**.layers.0.mlp.up_proj=none"], device="cpu")
    assert caught.value.code == "rule-shadowed"
    assert "'**.layers.0.mlp.up_proj=none' never applies" in str(caught.value)
    assert "'**.mlp.**=fp8' comes first" in str(caught.value)


def test_the_same_rule_twice_is_reported(awq):
    with pytest.raises(RuleError) as caught:
        prepare(awq.folder, ["**.mlp.**=fp8", "**.mlp.**=fp8"], device="cpu")
    assert caught.value.code == "rule-shadowed"


def test_all_bad_rules_are_in_one_error(awq):
    with pytest.raises(RuleError) as caught:
        prepare(
            awq.folder, ["**.nowhere=fp8", "**.mlp.**=fp8", "**.mlp.up_proj=none", "x=none"], device="cpu"
        )
    for part in ("**.nowhere=fp8", "**.mlp.up_proj=none", "x=none"):
        assert f"{part!r} " in str(caught.value)


@pytest.mark.parametrize(
    "rule, code, words",
    (
        ("**.mlp.**=fp9", "unknown-method", ("fp9", "Nearest: fp8")),
        ("**.mlp.**=fp8:granularty=block", "unknown-option", ("granularty", "Nearest: granularity")),
        ("**.mlp.**=fp8:granularity=row", "bad-option", ("granularity", "row", "tensor, channel, block")),
        ("**.mlp.**=awq:group_size=big", "bad-option", ("group_size", "big")),
        ("**.mlp.**=awq:group_size=48", "group-size", ("48", "128")),
        ("**.mlp.**=awq:group_size=0", "bad-option", ("group_size", "0")),
        ("**.mlp.**=awq:zero_point=maybe", "bad-option", ("zero_point", "maybe")),
        ("**.mlp.**=none:x=1", "unknown-option", ("none", "x")),
        ("**.mlp.**=compressed-tensors", "not-a-target", ("compressed-tensors",)),
    ),
)
def test_a_method_or_option_that_there_is_not_is_refused(plain, rule, code, words):
    with pytest.raises(ConfigError) as caught:
        prepare(plain.folder, rule, device="cpu")
    assert caught.value.code == code
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_nothing_is_read_before_the_rules_are_known_to_be_good(awq, monkeypatch):
    monkeypatch.setattr("pymllm.weights.tensor_file.TensorInfo.read", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(RuleError):
        load_model(awq.folder, "**.nowhere=fp8", device="cpu")


# --- conversions give what they say


def converted_logits(checkpoint, convert):
    """transformers' logits with `convert(name, weight)` for the linear layers."""
    model = random_model(checkpoint.model.config)
    model.load_state_dict(checkpoint.model.state_dict())
    with torch.no_grad():
        for name, module in model.named_modules():
            if name in checkpoint.linears:
                module.weight.copy_(convert(name, module.weight))
        return model(checkpoint.ids.unsqueeze(0), use_cache=False).logits[0]


def fp8_rows(weight):
    """e4m3 with a scale for each row, from the words of quantization/fp8/README.md."""
    scales = weight.abs().amax(1, keepdim=True) / 448
    return (weight / scales).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scales


def run(checkpoint, rules):
    model = load_model(checkpoint.folder, rules, device="cpu", dtype="float32")
    return model, logits_of(model, checkpoint.ids)


@pytest.mark.parametrize("fmt", ("plain", "awq"))
def test_a_fused_layer_with_mixed_parts_is_split_and_right(request, fmt):
    """gate in fp8, up as it was: separate weights, outputs side by side."""
    checkpoint = request.getfixturevalue(fmt)
    model, logits = run(checkpoint, "**.gate_proj=fp8")
    layer = model.model.layers[0].mlp.gate_up_proj
    assert isinstance(layer.quant_method, SplitLinearMethod)
    expected = converted_logits(
        checkpoint, lambda name, weight: fp8_rows(weight) if name.endswith("gate_proj") else weight
    )
    assert relative_error(logits, expected) <= 1e-5
    assert relative_error(logits, checkpoint.logits()) > 1e-3, "the conversion must matter"


def test_a_fused_layer_is_split_three_ways(awq):
    rules = ["**.q_proj=fp8", "**.k_proj=none"]
    model, logits = run(awq, rules)
    methods = [method.name for method in model.model.layers[1].self_attn.qkv_proj.quant_method.methods]
    assert methods == ["fp8", "none", "awq"]
    expected = converted_logits(
        awq, lambda name, weight: fp8_rows(weight) if name.endswith("q_proj") else weight
    )
    assert relative_error(logits, expected) <= 1e-5


def test_equal_methods_stay_one_matmul(awq):
    model, _ = run(awq, ["**.gate_proj=fp8", "**.up_proj=fp8"])
    assert not isinstance(model.model.layers[0].mlp.gate_up_proj.quant_method, SplitLinearMethod)


def test_mixed_parts_in_the_checkpoint_itself(tmp_path):
    """A checkpoint that leaves only up_proj alone; biases of a split layer are added as well."""
    checkpoint = write_checkpoint(
        tmp_path / "m", "llama", AWQ(64), ignored=("up_proj", "k_proj"), attention_bias=True, mlp_bias=True
    )
    model, logits = run(checkpoint, None)
    assert isinstance(model.model.layers[0].mlp.gate_up_proj.quant_method, SplitLinearMethod)
    assert relative_error(logits, checkpoint.logits()) <= 1e-5


def test_everything_decoded_is_the_dequantised_model(awq):
    model, logits = run(awq, "**=none")
    assert relative_error(logits, awq.logits()) <= 1e-6
    assert torch.equal(
        model.model.layers[1].mlp.down_proj.bound.packed["weight"],
        awq.model.model.layers[1].mlp.down_proj.weight,
    )


def test_a_tied_head_can_have_a_method_of_its_own(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", AWQ(64), tie_word_embeddings=True)
    _, logits = run(checkpoint, "lm_head=fp8")
    model = checkpoint.model
    with torch.no_grad():
        hidden = model.model(checkpoint.ids.unsqueeze(0), use_cache=False).last_hidden_state[0]
        expected = hidden @ fp8_rows(model.lm_head.weight).t()
    assert relative_error(logits, expected) <= 1e-5


def test_an_embedding_can_be_converted(plain):
    _, logits = run(plain, "model.embed_tokens=fp8")
    model = random_model(plain.model.config)
    model.load_state_dict(plain.model.state_dict())
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(fp8_rows(model.model.embed_tokens.weight))
        expected = model(plain.ids.unsqueeze(0), use_cache=False).logits[0]
    assert relative_error(logits, expected) <= 1e-5


@pytest.mark.parametrize(
    "rule", ("**.mlp.**=awq:group_size=32", "**.mlp.**=awq:group_size=-1", "**.mlp.**=fp8:granularity=block")
)
def test_a_conversion_is_near_the_original(plain, rule):
    """Rounding to nearest, however done, is off by at most half a step of each group or block."""
    model, _ = run(plain, rule)
    for index, layer in enumerate(model.model.layers):
        original = plain.model.model.layers[index].mlp.down_proj.weight
        weight = layer.mlp.down_proj.bound.canonical().dequantize(torch.float32)
        if "fp8" in rule:
            assert ((weight - original).abs() <= original.abs() * 2**-4 + 1e-4).all()
        else:
            size = 32 if "32" in rule else original.shape[1]
            groups = original.unflatten(1, (-1, size))
            step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 15
            # Half a step; the zero point's own rounding moves one end by up to half a step more.
            error = (weight - original).unflatten(1, (-1, size)).abs()
            assert (error <= step.unsqueeze(-1) * 1.02).all() and error.mean() <= step.mean() * 0.3


# --- what the checkpoint's own list leaves alone


def test_a_layer_with_quantised_tensors_is_quantised_whatever_a_loose_entry_says(tmp_path):
    """quantization/awq/README.md: writers read the entries differently; the files are the last word."""
    checkpoint = write_checkpoint(
        tmp_path / "m", "llama", AWQ(64), num_hidden_layers=1, ignored=("mlp.up_proj",)
    )
    edit_config(
        checkpoint.folder, quantization_config={"modules_to_not_convert": ["mlp.up_proj", "self_attn.q"]}
    )
    _, logits = run(checkpoint, None)
    assert relative_error(logits, checkpoint.logits()) <= 1e-5


def test_a_layer_the_list_leaves_alone_but_the_files_lack_is_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", "fp8-block", num_hidden_layers=1)
    edit_config(
        checkpoint.folder, quantization_config={"modules_to_not_convert": ["model.layers.0.mlp.up_proj"]}
    )
    tensors = {name: t for name, t in checkpoint.tensors.items() if ".up_proj." not in name}
    save_tensors(checkpoint.folder, tensors)
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj\.weight"):
        prepare(checkpoint.folder, device="cpu")


# --- the registry of formats


@pytest.fixture
def registry(monkeypatch):
    list_quantization_methods()
    monkeypatch.setattr(base, "_registry", dict(base._registry))


class Own(QuantizationConfig):
    @classmethod
    def get_name(cls):
        return "own"

    @classmethod
    def from_config(cls, config):
        return cls()

    @classmethod
    def from_options(cls, options):
        return UnquantizedLinearMethod()

    def get_quant_method(self, layer, prefix):
        return None


def test_a_format_registers_under_its_name(registry, plain):
    assert register_quantization("own")(Own) is Own
    assert get_quantization_config("own") is Own and "own" in list_quantization_methods()
    assert decisions(plain, "lm_head=own")["lm_head"].method.name == "none"


def test_a_name_is_taken_once(registry):
    with pytest.raises(ValueError, match="'awq'") as caught:
        register_quantization("awq")(Own)
    assert caught.value.code == "duplicate-method" and "AWQConfig" in str(caught.value)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(ConfigError) as caught:
        get_quantization_config("awk")
    for name in ("awq", "fp8", "compressed-tensors", "none"):
        assert name in list_quantization_methods() and name in str(caught.value)
    assert "Nearest: awq" in str(caught.value)


def test_every_format_knows_its_name_and_reads_an_empty_config_or_refuses_it():
    for name in list_quantization_methods():
        cls = get_quantization_config(name)
        assert cls.get_name() == name
        with contextlib.suppress(ConfigError):
            assert isinstance(cls.from_config({}), QuantizationConfig)


@pytest.mark.parametrize(
    ("written", "nearest"),
    [
        ("**.mpl.**", "**.mlp.**"),
        ("mlp.*", "**.mlp.*"),
        ("**.self_atn.q_porj", "**.self_attn.q_proj"),
        ("model.layer.0.**", "model.layers.0.**"),
        ("lmhead", "lm_head"),
        ("zzzz", None),
    ],
)
def test_a_pattern_that_names_nothing_has_a_nearest_one(written, nearest):
    layers = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    names = [f"model.layers.{n}.{layer}" for n in range(2) for layer in layers] + ["lm_head"]
    assert nearest_pattern(written, names) == nearest


def test_a_rule_with_an_unknown_method_lists_what_rules_may_have_the_nearest_first():
    with pytest.raises(ConfigError) as caught:
        Rule.parse("**=fp9").build()
    assert caught.value.expected.startswith("fp8 or ") and "Nearest: fp8" in str(caught.value)
    for only_read in ("bitsandbytes", "quark", "torchao"):
        assert only_read not in str(caught.value)
    with pytest.raises(ConfigError, match="only reads it"):
        Rule.parse("**=bitsandbytes").build()
