"""Hidden states of encoders equal transformers' own; every tensor of a checkpoint has its place or a reason."""

from __future__ import annotations

import json

import pytest
import torch

import pymllm
from pymllm.errors import CheckpointError, ConfigError, RuleError
from pymllm.models import find_definition, read_model_config
from pymllm.parallel import simulate

from .encoders import ENCODERS, TEXTS, edit_tensors, hidden_states, ids_of, make_model, write

# Sums of float32 against float64.
TOLERANCE = 3e-5
PREFIXES = {"bert": "bert.", "roberta": "roberta.", "xlm-roberta": "roberta.", "modernbert": "model."}


def load(folder, *args, **options) -> pymllm.LLM:
    return pymllm.LLM(folder, *args, device="cpu", **options)


def assert_equal_to_transformers(folder, model, texts=TEXTS, **options) -> None:
    llm = load(folder, **options)
    ids = [ids_of(text) for text in texts]
    found = llm.embedder.runner.hidden_states(ids).split([len(one) for one in ids])
    for one, got in zip(ids, found, strict=True):
        expected = hidden_states(model, one)
        assert float((got.double() - expected).abs().max() / expected.abs().max()) <= TOLERANCE


@pytest.mark.parametrize("family", ENCODERS)
def test_hidden_states_equal_transformers(tmp_path, family):
    model = make_model(family)
    assert_equal_to_transformers(write(tmp_path / "m", model, None), model)


@pytest.mark.parametrize("kernel", ("reference", "torch_sdpa", "native"))
def test_every_attention_kernel_gives_them(tmp_path, kernel):
    model = make_model("modernbert")
    folder = write(tmp_path / "m", model, None)
    assert_equal_to_transformers(folder, model, kernels={"attention": kernel})
    planned = pymllm.plan(folder, device="cpu", kernels={"attention": kernel})
    assert {row.kernel for row in planned.layers if row.kind == "attention"} == {kernel}


@pytest.mark.parametrize("family", ENCODERS)
def test_names_under_a_head_for_masked_tokens_are_the_same_model(tmp_path, family):
    model = make_model(family, "ForMaskedLM")
    folder = write(tmp_path / "m", model, None)
    inner = getattr(model, PREFIXES[family].rstrip("."))
    assert_equal_to_transformers(folder, inner)
    records = load(folder).load_report.tensors
    skipped = [record for record in records if record.status == "skipped"]
    assert skipped and all("head for masked tokens" in record.reason for record in skipped)


def test_old_names_of_norms_and_stored_positions_and_types(tmp_path):
    model = make_model("bert")
    folder = write(tmp_path / "m", model, None)

    def as_first_written(tensors):
        renamed = {
            f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): t
            for name, t in tensors.items()
        }
        types = torch.zeros((1, 64), dtype=torch.int64)
        return renamed | {
            "bert.embeddings.position_ids": torch.arange(64)[None],
            "bert.embeddings.token_type_ids": types,
        }

    edit_tensors(folder, as_first_written)
    assert_equal_to_transformers(folder, model)
    for name, wrong in (
        ("position_ids", torch.arange(64).flip(0)),
        ("token_type_ids", torch.ones(1, 64).long()),
    ):
        edit_tensors(
            folder, lambda tensors, name=name, wrong=wrong: tensors | {f"bert.embeddings.{name}": wrong}
        )
        with pytest.raises(CheckpointError, match=name):
            load(folder)
        edit_tensors(folder, lambda tensors, name=name: {n: t for n, t in tensors.items() if name not in n})


@pytest.mark.parametrize("family", ENCODERS)
def test_what_has_no_place_and_what_is_missing_is_one_error(tmp_path, family):
    folder = write(tmp_path / "m", make_model(family), None)
    known = "layers.1.attn.Wo.weight" if family == "modernbert" else "encoder.layer.1.output.dense.bias"

    def change(tensors):
        del tensors[known]
        return tensors | {"classifier.out_proj.weight": torch.zeros(2, 32)}

    edit_tensors(folder, change)
    with pytest.raises(CheckpointError) as raised:
        load(folder)
    assert known in str(raised.value) and "classifier.out_proj.weight" in str(raised.value)


def test_padding_tokens_within_a_text_have_no_position_in_roberta(tmp_path):
    model = make_model("roberta")
    llm = load(write(tmp_path / "m", model, None))
    texts = [[2, 5, 1, 6, 1, 1, 7, 3], [1, 4], [2, 3]]
    found = llm.embedder.runner.hidden_states(texts).split([8, 2, 2])
    for ids, got in zip(texts, found, strict=True):
        assert torch.allclose(got.double(), hidden_states(model, ids), atol=1e-4)


def test_the_most_tokens_are_those_that_have_a_position(tmp_path):
    for family, most in (("bert", 64), ("roberta", 62), ("modernbert", 64)):
        llm = load(write(tmp_path / family, make_model(family), None, sentence_bert_config={}), pooling="cls")
        assert llm.embedder.settings.max_length == most
        assert llm.embed("cat " * 99).shape == (32,)


def test_both_spellings_of_modernberts_settings(tmp_path):
    """transformers 5 writes layer_types and rope_parameters; files of transformers 4 have a period and two bases."""
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 500.0},
        "sliding_attention": {"rope_theta": 20.0},
    }
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    rope["sliding_attention"]["rope_type"] = "default"
    new = make_model("modernbert", rope_parameters=rope, layer_types=kinds)
    assert_equal_to_transformers(write(tmp_path / "new", new, None), new)
    bases = {"global_rope_theta": 500.0, "local_rope_theta": 20.0, "global_attn_every_n_layers": 2}
    old = make_model("modernbert", **bases)
    folder = write(tmp_path / "old", old, None)
    raw = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "layer_types"):
        raw.pop(name, None)
    (folder / "config.json").write_text(json.dumps(raw | bases))
    assert_equal_to_transformers(folder, old)


def test_biases_and_activations_that_the_config_asks_for(tmp_path):
    biases = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "hidden_activation": "silu"}
    model = make_model("modernbert", **biases)
    assert_equal_to_transformers(write(tmp_path / "modern", model, None), model)
    for activation in ("relu", "gelu_pytorch_tanh"):
        model = make_model("bert", hidden_act=activation)
        assert_equal_to_transformers(write(tmp_path / activation, model, None), model)


@pytest.mark.parametrize(
    "family, setting, value",
    (
        ("bert", "hidden_act", "quick_gelu"),
        ("bert", "position_embedding_type", "relative_key"),
        ("bert", "layer_norm_eps", 0),
        ("bert", "num_attention_heads", 5),
        ("roberta", "pad_token_id", 63),
        ("roberta", "pad_token_id", None),
        ("modernbert", "hidden_activation", 3),
        ("modernbert", "local_attention", 0),
        ("modernbert", "partial_rotary_factor", 0.5),
        ("modernbert", "layer_types", ["full_attention"]),
    ),
)
def test_settings_that_the_model_does_not_compute_with_are_refused_by_name(tmp_path, family, setting, value):
    folder = write(tmp_path / "m", make_model(family), None)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {setting: value}))
    with pytest.raises(ConfigError, match=setting):
        load(folder)


def test_a_model_type_with_a_dash_is_planned_under_its_own_name(tmp_path):
    folder = write(tmp_path / "m", make_model("xlm-roberta"), {"Pooling": {"pooling_mode_cls_token": True}})
    planned = pymllm.plan(folder, device="cpu")
    assert planned.model_type == "xlm-roberta"
    assert not any("no definition" in note for note in planned.notes)
    assert any("cls pooling; texts are cut at 24 tokens" in note for note in planned.notes)
    assert planned.kv_cache == {} and planned.totals["kv_cache_bytes_per_token"] == 0
    assert "no KV cache" in str(planned) and planned.to_dict()["kv_cache"] == {}
    assert read_model_config({"model_type": "xlm-roberta"}).pad_token_id == 1
    for options in ({"max_model_len": 10}, {"kv_memory": "1GB"}):
        with pytest.raises(ConfigError, match="KV cache"):
            pymllm.plan(folder, device="cpu", **options)


def test_a_decoder_s_class_is_no_encoder():
    assert find_definition({"model_type": "mine", "architectures": ["BertForCausalLM"]}) is None
    assert find_definition({"model_type": "mine", "architectures": ["LlamaForCausalLM"]}) == "llama"


@pytest.mark.parametrize("family", ENCODERS)
def test_rules_verify_swap_and_quantised_checkpoints(tmp_path, family):
    """int8 of the whole model, from a rule, from a swap and from a written checkpoint, is the same model."""
    folder = write(tmp_path / "m", make_model(family), {"Pooling": {"pooling_mode": "mean"}, "Normalize": {}})
    rules = ["**.Wi=int8", "**.attn.*=int8"] if family == "modernbert" else ["encoder.**=int8"]
    plain, ruled = load(folder), load(folder, rules)
    exact, rounded = plain.embed(TEXTS), ruled.embed(TEXTS)
    assert 1e-5 < float((exact - rounded).abs().max()) < 0.05
    assert pymllm.verify(ruled).ok and pymllm.verify(plain).ok
    pymllm.swap(plain, rules)
    assert torch.allclose(plain.embed(TEXTS), rounded, atol=1e-5)
    written = pymllm.quantize_checkpoint(folder, tmp_path / "q", rules, progress=False)
    assert "1_Pooling" in written.files
    assert float((load(tmp_path / "q").embed(TEXTS) - exact).abs().max()) < 0.05


@pytest.mark.parametrize("family", ENCODERS)
def test_ranks_share_the_heads_the_mlp_and_the_words(tmp_path, family):
    folder = write(tmp_path / "m", make_model(family), None)
    expected = load(folder).embed(TEXTS, pooling="mean")
    for found in simulate(2, lambda parallel: load(folder).embed(TEXTS, pooling="mean")):
        assert torch.allclose(found, expected, atol=1e-5)
    assert pymllm.plan(folder, device="cpu").tensor_parallel["legal_sizes"] == [1, 2, 4]


def test_activations_in_bfloat16(tmp_path):
    for family in ENCODERS:
        folder = write(tmp_path / family, make_model(family), {"Pooling": {}, "Normalize": {}})
        exact, rounded = load(folder).embed(TEXTS), load(folder, dtype="bfloat16").embed(TEXTS)
        assert rounded.dtype is torch.float32
        assert 1e-4 < float((exact - rounded).norm(dim=-1).max()) < 0.05


def test_what_needs_a_decoder_says_so(tmp_path):
    folder = write(tmp_path / "m", make_model("bert", "ForMaskedLM"), None)
    text = tmp_path / "text.txt"
    text.write_text("the cat runs " * 50)
    llm = load(folder)
    asks = (
        lambda: llm.generate("the cat"),
        lambda: llm.generate([]),
        lambda: llm.stream("the cat"),
        lambda: llm.chat([{"role": "user", "content": "the cat"}]),
        lambda: llm.logits([1, 2]),
        lambda: pymllm.verify(folder, end_to_end=True, device="cpu"),
        lambda: pymllm.search_rules(folder, bits=4.5, text=text),
        lambda: pymllm.quantize_checkpoint(
            folder, tmp_path / "q", ["**.dense=int4:group_size=32"], calibrate=text, progress=False
        ),
    )
    for ask in asks:
        with pytest.raises(ConfigError, match="encoder"):
            ask()
    with pytest.raises(RuleError, match="No layer of this model"):
        load(folder, kv_cache="int8")
