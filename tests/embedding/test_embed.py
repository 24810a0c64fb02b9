"""`LLM.embed` against formulas of its own over transformers' hidden states, module by module."""

# T tokens, H hidden size, D size of a vector

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import pymllm
from pymllm.errors import CheckpointError, ConfigError, RequestError

from .encoders import (
    MAX_LENGTH,
    SIZES,
    TEXTS,
    edit_tensors,
    hidden_states,
    ids_of,
    make_model,
    make_tokenizer,
    write,
)

TOLERANCE = 1e-5
# Of hidden states [T, H], the first `skip` of which are a prompt's.
FORMULAS = {
    "cls": lambda states, skip: states[skip],
    "max": lambda states, skip: states[skip:].amax(0),
    "mean": lambda states, skip: states[skip:].sum(0) / (len(states) - skip),
    "mean_sqrt_len_tokens": lambda states, skip: states[skip:].sum(0) / (len(states) - skip) ** 0.5,
    "weightedmean": lambda states, skip: (
        sum(states[i] * (i + 1) for i in range(skip, len(states))) / sum(range(skip + 1, len(states) + 1))
    ),
    "lasttoken": lambda states, skip: states[-1],
}
SWITCHES = {
    "cls": "cls_token",
    "max": "max_tokens",
    "mean": "mean_tokens",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens",
    "lasttoken": "lasttoken",
}


@pytest.fixture(scope="module")
def bert():
    return make_model("bert")


def load(folder, **options) -> pymllm.LLM:
    return pymllm.LLM(folder, device="cpu", **options)


def assert_close(found, expected) -> None:
    assert found.dtype is torch.float32 and found.device.type == "cpu"
    assert found.shape == expected.shape
    assert float((found.double() - expected.double()).abs().max()) <= TOLERANCE * float(expected.abs().max())


@pytest.mark.parametrize("mode", FORMULAS)
def test_every_pooling_mode_in_both_spellings_and_as_an_argument(tmp_path, bert, mode):
    expected = torch.stack([FORMULAS[mode](hidden_states(bert, ids_of(text)), 0) for text in TEXTS])
    old = {"word_embedding_dimension": 32} | {
        f"pooling_mode_{name}": other == mode for other, name in SWITCHES.items()
    }
    for name, pooling in (("old", old), ("new", {"embedding_dimension": 32, "pooling_mode": mode})):
        assert_close(load(write(tmp_path / name, bert, {"Pooling": pooling})).embed(TEXTS), expected)
    # Without modules.json, sentence-transformers looks at the tokenizer alone.
    plain = load(write(tmp_path / "none", bert, None, tokenizer_config={"model_max_length": MAX_LENGTH}))
    assert_close(plain.embed(TEXTS, pooling=mode), expected)
    assert_close(load(tmp_path / "old", pooling=mode).embed(list(TEXTS)), expected)


def test_several_modes_lie_side_by_side(tmp_path, bert):
    switches = {
        "pooling_mode_mean_tokens": True,
        "pooling_mode_cls_token": True,
        "pooling_mode_max_tokens": True,
    }
    llm = load(write(tmp_path / "m", bert, {"Pooling": switches, "Normalize": {}}))
    states = hidden_states(bert, ids_of(TEXTS[0]))
    expected = torch.cat([FORMULAS[mode](states, 0) for mode in ("cls", "max", "mean")])
    assert_close(llm.embed(TEXTS[0]), expected / expected.norm())
    assert_close(llm.embed(TEXTS[0], normalize=False), expected)
    both = torch.cat([FORMULAS["lasttoken"](states, 0), FORMULAS["mean"](states, 0)])
    assert_close(llm.embed(TEXTS[0], pooling=("lasttoken", "mean"), normalize=False), both)
    assert llm.embed([]).shape == (0, 96) and llm.embed([], dimensions=7).shape == (0, 7)


def test_a_vector_does_not_depend_on_the_texts_beside_it_nor_on_batches(tmp_path, bert, monkeypatch):
    llm = load(write(tmp_path / "m", bert, {"Pooling": {"pooling_mode": "mean"}}))
    texts = [" ".join(TEXTS[0].split() * (i % 7 + 1)) for i in range(40)]
    together = llm.embed(texts)
    assert_close(torch.stack([llm.embed(text) for text in texts]), together)
    monkeypatch.setattr("pymllm.embedding.embedder.BATCH_TOKENS", 30)
    inputs = llm.embedder.encode(texts)
    batches = list(llm.embedder.batches(inputs))
    assert [one for batch in batches for one in batch] == inputs and len(batches) > 10
    assert all(sum(len(one.ids) for one in batch) <= 30 for batch in batches)
    assert_close(llm.embed(texts), together)


def test_texts_are_cut_at_the_folder_s_length_and_ids_are_not(tmp_path, bert):
    long = "cat dog " * 40
    for name, files, most in (
        ("own", {}, MAX_LENGTH),
        ("tokenizer", {"sentence_bert_config": {}, "tokenizer_config": {"model_max_length": 17}}, 17),
        (
            "model",
            {
                "sentence_bert_config": {"max_seq_length": 9999},
                "tokenizer_config": {"model_max_length": 1e30},
            },
            64,
        ),
    ):
        llm = load(write(tmp_path / name, bert, {"Pooling": {}}, **files))
        ids = ids_of(long, most)
        assert len(ids) == most and ids[-1] == 3
        assert_close(llm.embed(long), FORMULAS["mean"](hidden_states(bert, ids), 0))
        assert_close(llm.embed(ids), llm.embed(long))
        with pytest.raises(RequestError, match=f"to {most} tokens, found {most + 1}"):
            llm.embed([[5], [5] * (most + 1)])
    left = {"truncation_side": "left"}
    llm = load(write(tmp_path / "left", bert, {"Pooling": {}}, tokenizer_config=left))
    words = [id for id in ids_of(long + "house", 99) if id > 3][-(MAX_LENGTH - 2) :]
    assert_close(llm.embed(long + "house"), FORMULAS["mean"](hidden_states(bert, [2, *words, 3]), 0))


def test_lower_case_and_a_vocabulary_without_tokenizer_json(tmp_path, bert):
    tokenizer = make_tokenizer()
    folder = write(
        tmp_path / "m",
        bert,
        {"Pooling": {}},
        sentence_bert_config={"do_lower_case": True, "max_seq_length": MAX_LENGTH},
    )
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    expected = FORMULAS["mean"](hidden_states(bert, ids_of("the cat")), 0)
    assert_close(load(folder).embed("THE CAT"), expected)
    # A special token that stands in the text is not put in lower case; and the generator's tokenizer stays.
    llm = load(folder)
    ids = ids_of("the [SEP] cat")
    assert 3 in ids[1:-1] and [*llm.embedder.encode(["THE [SEP] CAT"])[0].ids] == ids
    assert llm.tokenizer is llm.embedder.tokenizer is not llm.embedder.reader
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    assert_close(load(folder).embed("THE CAT"), expected)
    assert_close(load(folder).embed(TEXTS[4]), FORMULAS["mean"](hidden_states(bert, ids_of(TEXTS[4])), 0))
    assert load(folder).embedder.encode(["THE [SEP] CAT"])[0].ids == tuple(ids)


@pytest.mark.parametrize("mode", FORMULAS)
def test_prompts_by_name_by_default_and_left_out_of_the_pooling(tmp_path, bert, mode):
    prompts = {"prompts": {"query": "query : ", "document": None}, "default_prompt_name": "query"}
    pooling = {"pooling_mode": mode, "include_prompt": False}
    llm = load(write(tmp_path / "m", bert, {"Pooling": pooling}, config_sentence_transformers=prompts))
    states = hidden_states(bert, ids_of("query : the cat"))
    # [CLS] query : are left out, and no [SEP], as it comes behind the text.
    assert_close(llm.embed("the cat"), FORMULAS[mode](states, 3))
    assert_close(llm.embed("the cat", prompt_name="query"), llm.embed("the cat"))
    assert_close(llm.embed("the cat", prompt="query : "), llm.embed("the cat"))
    plain = FORMULAS[mode](hidden_states(bert, ids_of("the cat")), 0)
    assert_close(llm.embed("the cat", prompt_name="document"), plain)
    assert_close(llm.embed("the cat", prompt=""), plain)
    with pytest.raises(RequestError, match="query"):
        llm.embed("the cat", prompt_name="qeury")
    bare = load(write(tmp_path / "bare", bert, {"Pooling": pooling}))
    assert_close(bare.embed("the cat", prompt_name="query"), plain)
    with pytest.raises(RequestError, match="no tokens of its own"):
        llm.embed("the cat", prompt="cat " * 50)
    edited = json.loads((tmp_path / "m/1_Pooling/config.json").read_text()) | {"include_prompt": True}
    (tmp_path / "m/1_Pooling/config.json").write_text(json.dumps(edited))
    pooled = load(tmp_path / "m")
    assert_close(pooled.embed("the cat"), FORMULAS[mode](states, 0))
    cut = hidden_states(bert, ids_of("cat " * 50 + "the cat"))
    assert_close(pooled.embed("the cat", prompt="cat " * 50), FORMULAS[mode](cut, 0))


def test_a_projection_its_activation_and_its_residual(tmp_path, bert):
    generator = torch.Generator().manual_seed(1)
    cases = (
        ("tanh", {"out_features": 16, "activation_function": "torch.nn.modules.activation.Tanh"}, torch.tanh),
        (
            "none",
            {"out_features": 8, "bias": False, "activation_function": "torch.nn.modules.linear.Identity"},
            lambda x: x,
        ),
        (
            "same",
            {
                "out_features": 32,
                "use_residual": True,
                "activation_function": "torch.nn.modules.activation.ReLU",
            },
            torch.relu,
        ),
        ("other", {"out_features": 12, "use_residual": True}, torch.tanh),
    )
    states = hidden_states(bert, ids_of(TEXTS[0]))
    pooled = FORMULAS["mean"](states, 0)
    for name, settings, activation in cases:
        dense = {"in_features": 32, "bias": True, "module_input_name": "sentence_embedding"} | settings
        folder = write(
            tmp_path / name,
            bert,
            {"Pooling": {}, "Dense": dense, "Dropout": {"dropout": 0.5}, "Normalize": {}},
        )
        outputs = dense["out_features"]
        tensors = {"linear.weight": torch.randn(outputs, 32, generator=generator)}
        if dense["bias"]:
            tensors["linear.bias"] = torch.randn(outputs, generator=generator)
        if name == "other":
            tensors["residual.weight"] = torch.randn(outputs, 32, generator=generator)
        save_file(tensors, folder / "2_Dense/model.safetensors")
        wide = {key: tensor.double() for key, tensor in tensors.items()}
        expected = activation(wide["linear.weight"] @ pooled + wide.get("linear.bias", 0))
        if settings.get("use_residual"):
            expected = expected + (wide["residual.weight"] @ pooled if name == "other" else pooled)
        llm = load(folder)
        assert_close(llm.embed(TEXTS[0], normalize=False), expected)
        assert_close(llm.embed(TEXTS[0]), expected / expected.norm())
        assert_close(llm.embed(TEXTS[0], dimensions=5), expected[:5] / expected[:5].norm())
        assert_close(llm.embed(TEXTS[0], dimensions=5, normalize=False), expected[:5])
        assert llm.embed([]).shape == (0, outputs)


def test_a_projection_whose_tensors_are_not_its_settings_is_one_error(tmp_path, bert):
    folder = write(tmp_path / "m", bert, {"Pooling": {}, "Dense": {"in_features": 32, "out_features": 4}})
    file = folder / "2_Dense/model.safetensors"
    good = {"linear.weight": torch.zeros(4, 32), "linear.bias": torch.zeros(4)}
    for tensors in (
        None,
        {"linear.weight": good["linear.weight"]},
        good | {"linear.weight": torch.zeros(32, 4)},
        good | {"scale": torch.zeros(1)},
        good | {"linear.bias": torch.zeros(4, dtype=torch.int64)},
        good | {"linear.bias": torch.full((4,), float("nan"))},
        good | {"linear.weight": torch.full((4, 32), float("inf"))},
    ):
        if tensors is not None:
            save_file(tensors, file)
        with pytest.raises(CheckpointError, match="2_Dense"):
            load(folder).embed("the cat")
    save_file(good, file)
    with pytest.raises(ConfigError, match="in_features"):
        load(folder).embed("the cat", pooling=["cls", "mean"])


def modules_of(*types):
    return [{"idx": i, "name": str(i), "path": path, "type": name} for i, (name, path) in enumerate(types)]


BASE = "sentence_transformers.models."


@pytest.mark.parametrize(
    "files, named",
    (
        (
            {"modules": modules_of((BASE + "Transformer", ""), (BASE + "WeightedLayerPooling", "1"))},
            "WeightedLayerPooling",
        ),
        (
            {"modules": modules_of((BASE + "Transformer", ""), ("custom_st.Pooling", "1"))},
            "custom_st.Pooling",
        ),
        ({"modules": modules_of((BASE + "CLIPModel", ""))}, "CLIPModel"),
        ({"modules": modules_of((BASE + "Pooling", "1"))}, "Transformer"),
        ({"modules": modules_of((BASE + "Transformer", ""), (BASE + "Normalize", "1"))}, "one Pooling"),
        ({"modules": modules_of((BASE + "Transformer", ""), (BASE + "Pooling", "../x"))}, r"\.\./x"),
        ({"modules": modules_of((BASE + "Transformer", ""), (BASE + "Pooling", "x" * 256))}, "xxx"),
        ({"modules": modules_of((BASE + "Transformer", ""), (BASE + "Pooling", "\ud800"))}, "ud800"),
        ({"modules": modules_of((BASE + "Transformer", ""), (BASE + "Pooling", "missing"))}, "missing"),
        ({"modules": {"no": "list"}}, "list"),
        ({"modules": []}, "list"),
        ({"sentence_bert_config": {"max_seq_length": 0}}, "max_seq_length"),
        ({"sentence_bert_config": {"max_seq_length": "many"}}, "max_seq_length"),
        ({"sentence_bert_config": {"do_lower_case": "no"}}, "do_lower_case"),
        ({"sentence_bert_config": {"tokenizer_args": {"model_max_length": 5}}}, "tokenizer_args"),
        ({"sentence_bert_config": {"config_args": {"hidden_act": "relu"}}}, "config_args"),
        ({"sentence_bert_config": {"transformer_task": "fill-mask"}}, "transformer_task"),
        ({"sentence_bert_config": {"processing_kwargs": {"text": {"max_length": 3}}}}, "processing_kwargs"),
        ({"sentence_bert_config": {"modality_config": {"text": {"method": "encode"}}}}, "modality_config"),
        ({"config_sentence_transformers": {"prompts": ["query"]}}, "prompts"),
        ({"config_sentence_transformers": {"default_prompt_name": "query"}}, "default_prompt_name"),
        ({"config_sentence_transformers": {"default_prompt_name": ["query"]}}, "default_prompt_name"),
        ({"1_Pooling/config": {"pooling_mode_cls_token": "false"}}, "pooling_mode_cls_token"),
        ({"1_Pooling/config": {"pooling_mode": "attention"}}, "pooling_mode"),
        ({"1_Pooling/config": {"pooling_mode": 3}}, "pooling_mode"),
        ({"1_Pooling/config": {"pooling_mode_attention": True}}, "pooling_mode_attention"),
        ({"1_Pooling/config": {"include_prompt": "yes"}}, "include_prompt"),
        ({"2_Normalize/config": {"module_input_name": "token_embeddings"}}, "module_input_name"),
    ),
    ids=str,
)
def test_what_a_folder_asks_for_and_pymllm_has_not_is_refused_by_name(tmp_path, bert, files, named):
    folder = write(tmp_path / "m", bert, {"Pooling": {}, "Normalize": {}}, **files)
    llm = load(folder)  # loading does not need it, and the plan says so
    with pytest.raises((ConfigError, CheckpointError), match=named):
        llm.embed("the cat")
    assert any(note.startswith("no embeddings: ") for note in llm.plan.notes)


@pytest.mark.parametrize("name", ("modules.json", "sentence_bert_config.json"))
def test_a_link_to_nothing_is_no_missing_file(tmp_path, bert, name):
    folder = write(tmp_path / "m", bert, {"Pooling": {}})
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=name):
        load(folder).embed("the cat")


def test_modules_that_are_nested_too_deeply_are_no_json(tmp_path, bert):
    folder = write(tmp_path / "m", bert, {"Pooling": {}})
    (folder / "modules.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        load(folder).embed("the cat")


def test_arguments_of_other_types_are_refused_by_name(tmp_path, bert):
    llm = load(write(tmp_path / "m", bert, {"Pooling": {}}))
    for given in ({"prompt": 3}, {"prompt_name": ["query"]}, {"normalize": "no"}):
        with pytest.raises(RequestError, match=next(iter(given))):
            llm.embed("the cat", **given)
    for pooling in (3, [], ["mean", ["cls"]]):
        with pytest.raises(ConfigError, match="pooling"):
            llm.embed("the cat", pooling=pooling)
    for text in (3, None, [None], {"a": 1}, "half \ud800"):
        with pytest.raises(RequestError, match=r"prompt|half"):
            llm.embed(text)


@pytest.mark.parametrize(
    "change, named",
    (
        ({"activation_function": "torch.nn.modules.activation.Softmax"}, "activation_function"),
        ({"activation_function": "mine.Tanh"}, "activation_function"),
        ({"in_features": None}, "in_features"),
        ({"bias": 1}, "bias"),
        ({"module_output_name": "token_embeddings"}, "module_output_name"),
    ),
)
def test_a_projection_with_other_settings_is_refused_by_name(tmp_path, bert, change, named):
    dense = {"in_features": 32, "out_features": 4} | change
    llm = load(write(tmp_path / "m", bert, {"Pooling": {}, "Dense": dense}))
    with pytest.raises(ConfigError, match=named):
        llm.embed("the cat")


def test_without_a_pooling_there_is_one_error_that_says_how_to_choose(tmp_path, bert):
    llm = load(write(tmp_path / "m", bert, None))
    with pytest.raises(ConfigError, match=r"pooling='mean'"):
        llm.embed("the cat")
    with pytest.raises(ConfigError, match="mean"):
        llm.embed("the cat", pooling="meen")
    for dimensions in (0, -1, 33, 1.5, True):
        with pytest.raises(RequestError, match="dimensions"):
            llm.embed("the cat", pooling="mean", dimensions=dimensions)
    for wrong in ([[]], [[1, 40]], [[1, -1]], [None]):
        with pytest.raises(RequestError):
            llm.embed(wrong, pooling="mean")


def test_a_model_in_a_folder_of_its_own(tmp_path, bert):
    """Early folders have the model in 0_Transformer, and the other modules beside it."""
    folder = write(tmp_path / "m", bert, {"Pooling": {"pooling_mode": "cls"}})
    expected = load(folder).embed(TEXTS)
    entries = json.loads((folder / "modules.json").read_text())
    entries[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "0_Transformer").mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json", "sentence_bert_config.json"):
        (folder / file).rename(folder / "0_Transformer" / file)
    for path in (folder, folder / "0_Transformer"):
        assert_close(load(path).embed(TEXTS), expected)
    pymllm.quantize_checkpoint(folder, tmp_path / "q", ["encoder.**=int8"], progress=False)
    assert float((load(tmp_path / "q").embed(TEXTS) - expected).abs().max()) < 0.1


# --- decoders


@pytest.mark.parametrize("tied", (False, True))
def test_a_decoder_saved_without_its_head(tmp_path, tied):
    """As Qwen3-Embedding is: names without `model.`; with tied embeddings it also generates, else it does not."""
    model = make_model("qwen3", tie_word_embeddings=tied)
    modules = {"Pooling": {"pooling_mode_lasttoken": True, "include_prompt": True}, "Normalize": {}}
    prompts = {"prompts": {"query": "query text : "}}
    folder = write(tmp_path / "m", model, modules, config_sentence_transformers=prompts)
    assert "layers.0.self_attn.q_proj.weight" in load_file(folder / "model.safetensors")
    llm = load(folder)
    states = [hidden_states(model, ids_of(f"query text : {text}"))[-1] for text in TEXTS]
    expected = torch.stack([state / state.norm() for state in states])
    assert_close(llm.embed(TEXTS, prompt_name="query"), expected)
    rules = ["model.layers.**=int8"]
    rounded = load(folder, quant=rules)
    assert pymllm.verify(rounded).ok
    pymllm.quantize_checkpoint(folder, tmp_path / "q", rules, progress=False)
    again = load(tmp_path / "q")
    assert float((again.embed(TEXTS, prompt_name="query") - expected).abs().max()) < 0.1
    assert llm.generates is tied is again.generates
    if tied:
        assert (
            len(llm.generate("the cat", pymllm.SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids)
            == 3
        )
    else:
        assert not any(row.kind == "lm_head" for row in llm.plan.layers)
        for ask in (lambda: llm.generate("the cat"), lambda: llm.logits([1])):
            with pytest.raises(ConfigError, match="no head"):
                ask()


def test_a_decoder_that_was_trained_into_an_encoder(tmp_path):
    """EmbeddingGemma: Gemma 3 whose tokens see those after them, all or half a window of them; it has no head."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    both = {"use_bidirectional_attention": True, "sliding_window": 6, "layer_types": kinds}
    model = make_model("gemma3_text", **both)
    llm = load(write(tmp_path / "m", model, {"Pooling": {"pooling_mode": "mean"}}))
    expected = torch.stack([FORMULAS["mean"](hidden_states(model, ids_of(text)), 0) for text in TEXTS])
    assert float((llm.embed(TEXTS) - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert (
        not llm.generates and llm.plan.kv_cache == {} and llm.plan.layers[-1].method_detail == "no KV cache"
    )
    assert not any(row.kind == "lm_head" for row in llm.plan.layers)
    with pytest.raises(ConfigError, match="encoder"):
        llm.generate("the cat")
    causal = load(write(tmp_path / "causal", make_model("gemma3_text", sliding_window=6), None))
    assert causal.generates


def test_a_decoder_that_lost_its_head_is_still_an_incomplete_checkpoint(tmp_path):
    model = make_model("qwen3", "ForCausalLM", tie_word_embeddings=False)
    folder = write(tmp_path / "m", model, None)
    edit_tensors(folder, lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    with pytest.raises(CheckpointError, match=r"lm_head.weight.*missing"):
        load(folder)


def test_any_decoder_embeds_beside_generating(tmp_path):
    model = make_model("qwen3", "ForCausalLM", tie_word_embeddings=False)
    llm = load(write(tmp_path / "m", model, None, tokenizer_config={"model_max_length": MAX_LENGTH}))
    states = [hidden_states(model.model, ids_of(text)) for text in TEXTS]
    stream = llm.stream([2, 5, 6], pymllm.SamplingParams(max_tokens=4, ignore_eos=True))
    next(stream)
    for mode in ("mean", "lasttoken"):
        expected = torch.stack([FORMULAS[mode](state, 0) for state in states])
        assert_close(llm.embed(TEXTS, pooling=mode), expected)
    assert len(list(stream)) == 3
    assert SIZES["hidden_size"] == llm.embed("cat", pooling="mean").shape[0]
