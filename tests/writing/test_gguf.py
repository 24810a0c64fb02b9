"""GGUF files that `quantize_checkpoint` writes: read by the `gguf` package, by transformers and by this package."""

from __future__ import annotations

import json
import os

import gguf
import numpy as np
import pytest
import torch
import transformers

import pymllm
from pymllm.api import shipped_model
from pymllm.errors import ConfigError
from pymllm.text.gguf_tokenizer import GGUFTokenizer
from pymllm.text.tokenizer import Tokenizer
from pymllm.weights.gguf_file import GGUFFile
from pymllm.writing import output, single_file

from ..checkpoints import FAMILIES, load_tensors, relative_error, write_checkpoint
from ..forward import logits_of
from ..gguf_files import SIZES, write_gguf
from ..moe_checkpoints import write_moe
from .layouts import decode_compressed
from .stopping import Stop, stop_at

BLOCKS = "model.layers.**"
# What stands in GGUF files only with the values that real models have.
SETTINGS = {
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32, "sliding_window_pattern": 6},
}
EXPERTS = {"mixtral": {}, "qwen2_moe": {}, "qwen3_moe": {"mlp_only_layers": []}}


def read(path) -> dict[str, tuple[str, np.ndarray]]:
    """The tensors of a file, as the `gguf` package reads them: type, and float32 values."""
    reader = gguf.GGUFReader(path)
    return {
        t.name: (t.tensor_type.name, gguf.dequantize(np.array(t.data), t.tensor_type).astype(np.float32))
        for t in reader.tensors
    }


def field(path, key):
    return gguf.GGUFReader(path).get_field(key).contents()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_5_text"])
def test_floats_of_every_family_are_the_same_model(family, tmp_path):
    there = write_checkpoint(tmp_path / "in", family, "none", **SETTINGS.get(family, {}))
    pymllm.quantize_checkpoint(there.folder, tmp_path / "out.gguf", {BLOCKS: "none"})
    model = pymllm.load_model(tmp_path / "out.gguf", dtype="float32")
    assert relative_error(logits_of(model, there.ids), there.logits()) < 1e-5


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_one_tensor_a_layer(family, tmp_path):
    there = write_moe(tmp_path / "in", family, "none", **EXPERTS[family])
    rules = ["**.experts.**.down_proj=gguf:type=Q5_0", "**.w2=gguf:type=Q5_0", "**=none"]
    rules = [rule for rule in rules if ("w2" in rule) == (family == "mixtral") or rule == "**=none"]
    pymllm.quantize_checkpoint(there.folder, tmp_path / "out.gguf", rules)
    tensors = read(tmp_path / "out.gguf")
    kind, down = tensors["blk.0.ffn_down_exps.weight"]
    assert kind == "Q5_0" and down.ndim == 3 and tensors["blk.0.ffn_up_exps.weight"][0] == "F32"
    direct = pymllm.load_model(there.folder, rules, dtype="float32")
    model = pymllm.load_model(tmp_path / "out.gguf", dtype="float32")
    assert relative_error(logits_of(model, there.ids), logits_of(direct, there.ids)) < 2e-6
    if family == "qwen3_moe":
        some = rules[0].replace("experts.**", "experts.0")
        with pytest.raises(ConfigError, match="same rule"):
            pymllm.quantize_checkpoint(there.folder, tmp_path / "no.gguf", [some, "**=none"])


RULES = [
    "model.embed_tokens=gguf:type=Q6_K",
    "lm_head=gguf:type=Q8_0",
    "**.down_proj=gguf:type=Q5_K",
    "**.v_proj=mxfp4",
    "**.o_proj=int4:group_size=64,symmetric=true",
    "**.mlp.gate_proj=gguf:type=BF16",
    "**=gguf:type=Q4_K",
]
TYPES = {
    **{"token_embd": "Q6_K", "output": "Q8_0", "ffn_down": "Q5_K", "attn_v": "MXFP4", "attn_output": "Q4_0"},
    **{"ffn_gate": "BF16", "ffn_up": "Q4_K", "attn_q": "Q4_K", "attn_k": "Q4_K"},
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_each_layer_has_the_type_of_its_rule_and_the_values_of_its_method(family, tmp_path):
    there = write_checkpoint(tmp_path / "in", family, "none", **SIZES)
    written = pymllm.quantize_checkpoint(there.folder, tmp_path / "out.gguf", RULES)
    assert written.spelling == "gguf" and written.files == ["out.gguf"]
    assert written.path == str(tmp_path / "out.gguf") and os.listdir(
        tmp_path / "out.gguf".removesuffix("out.gguf")
    )
    assert written.written_bytes == (tmp_path / "out.gguf").stat().st_size
    tensors = read(tmp_path / "out.gguf")
    for name, (kind, _) in tensors.items():
        part = name.removesuffix(".weight").rpartition(".")[2]
        assert kind == TYPES.get(part, "F32"), name
    # The same rules while loading hold the same numbers: nothing was rounded twice.
    direct = pymllm.load_model(there.folder, RULES, dtype="float32", compute="exact")
    model = pymllm.load_model(tmp_path / "out.gguf", dtype="float32", compute="exact")
    assert pymllm.verify(model).ok
    assert relative_error(logits_of(model, there.ids), logits_of(direct, there.ids)) < 2e-6
    # Rows of q lie in the order that llama.cpp wants for the llama architecture.
    query = there.tensors["model.layers.0.self_attn.q_proj.weight"].numpy()
    if family == "llama":
        query = query.reshape(4, 2, 32, 256).swapaxes(1, 2).reshape(256, 256)
    found = tensors["blk.0.attn_q.weight"][1]
    assert np.linalg.norm(found - query) < 0.1 * np.linalg.norm(query)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same_weights(family, tmp_path):
    # transformers does not read the head size of Qwen3, and takes it for 128.
    sizes = {"head_dim": 128} if family == "qwen3" else {}
    there = write_checkpoint(tmp_path / "in", family, "none", **sizes)
    pymllm.quantize_checkpoint(there.folder, tmp_path / "out.gguf", {BLOCKS: "none", "lm_head": "none"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="out.gguf", dtype=torch.float32
    ).state_dict()
    for name, weight in there.model.state_dict().items():
        assert torch.equal(theirs[name], weight), name


def test_blocks_of_a_gguf_source_are_copied_and_all_else_comes_along(tmp_path):
    write_gguf(tmp_path / "in.gguf", "llama", lambda name: "Q8_0" if "attn_k" in name else "Q4_K")
    written = pymllm.quantize_checkpoint(
        tmp_path / "in.gguf", tmp_path / "out.gguf", {"**.up_proj": "gguf:type=Q6_K"}
    )
    assert sum(layer.rule is None for layer in written.layers) == len(written.layers) - 2
    before, after = GGUFFile.open(tmp_path / "in.gguf"), GGUFFile.open(tmp_path / "out.gguf")
    with before, after:
        for name, info in before.tensors.items():
            same = torch.equal(info.read(), after.tensors[name].read())
            assert same == ("ffn_up" not in name), name
        changed = {"general.file_type", "general.quantization_version", "general.type", "general.name"}
        for key, value in before.metadata.items():
            assert key in changed or np.array_equal(after.metadata[key], value), key
    assert field(tmp_path / "out.gguf", "general.file_type") == 15


@pytest.mark.parametrize("stored", ["none", "mxfp4"])
def test_experts_that_a_tensor_holds_all_of_are_cut(stored, tmp_path):
    """gpt-oss: gate and up in turns, in floats with inputs before outputs; their biases alike."""
    there = write_moe(tmp_path / "in", "gpt_oss", stored)
    written = pymllm.quantize_checkpoint(there.folder, tmp_path / "out.gguf", {"**.self_attn.**": "none"})
    tensors = read(tmp_path / "out.gguf")
    weights = there.model.state_dict()
    gate_up = weights["model.layers.1.mlp.experts.gate_up_proj"].numpy()  # [E, H, 2·I]
    biases = weights["model.layers.1.mlp.experts.gate_up_proj_bias"].numpy()
    down = weights["model.layers.1.mlp.experts.down_proj"].numpy()
    for found, expected in (("gate", gate_up[:, :, 0::2]), ("up", gate_up[:, :, 1::2]), ("down", down)):
        kind, values = tensors[f"blk.1.ffn_{found}_exps.weight"]
        assert kind == ("F32" if stored == "none" else "MXFP4")
        assert np.array_equal(values, expected.swapaxes(1, 2))
    assert np.array_equal(tensors["blk.1.ffn_gate_exps.bias"][1], biases[:, 0::2])
    assert np.array_equal(tensors["blk.1.ffn_up_exps.bias"][1], biases[:, 1::2])
    assert {layer.error for layer in written.layers if "experts" in layer.prefix} == {0.0}
    model = pymllm.load_model(tmp_path / "out.gguf", dtype="float32")
    assert relative_error(logits_of(model, there.ids), there.logits()) < 1e-5


def test_experts_whose_gate_and_up_lie_one_after_the_other_are_cut(tmp_path):
    there = write_moe(tmp_path / "in", "qwen3_moe", "none", stacked=True, mlp_only_layers=[])
    assert any(name.endswith("experts.gate_up_proj") for name in load_tensors(there.folder))
    pymllm.quantize_checkpoint(there.folder, tmp_path / "out.gguf", {"**.self_attn.**": "none"})
    model = pymllm.load_model(tmp_path / "out.gguf", dtype="float32")
    assert relative_error(logits_of(model, there.ids), there.logits()) < 1e-5


def test_a_rule_for_the_tensor_of_all_experts_is_a_rule_for_each(tmp_path):
    there = write_moe(tmp_path / "in", "gpt_oss", "none")
    rules = {
        "**.experts.gate_up_proj": "gguf:type=Q5_0",
        "**.experts.down_proj": "mxfp4",
        "**.q_proj": "none",
    }
    pymllm.quantize_checkpoint(there.folder, tmp_path / "out.gguf", rules)
    kinds = {name: kind for name, (kind, _) in read(tmp_path / "out.gguf").items()}
    parts = ("gate", "up", "down")
    assert [kinds[f"blk.0.ffn_{name}_exps.weight"] for name in parts] == ["Q5_0", "Q5_0", "MXFP4"]
    direct = pymllm.load_model(there.folder, rules, dtype="float32", compute="exact")
    model = pymllm.load_model(tmp_path / "out.gguf", dtype="float32", compute="exact")
    assert relative_error(logits_of(model, there.ids), logits_of(direct, there.ids)) < 2e-6


@pytest.mark.parametrize("format", ["awq", "gptq"])
def test_a_tied_head_that_no_rule_names_keeps_its_blocks_and_is_refused_by_its_own_name(format, tmp_path):
    write_gguf(tmp_path / "in.gguf", "llama", "Q6_K", tie_word_embeddings=True)
    rules = {BLOCKS: format + ":group_size=64", "model.embed_tokens": "none"}
    with pytest.raises(ConfigError, match="lm_head=") as caught:
        pymllm.quantize_checkpoint(tmp_path / "in.gguf", tmp_path / "out", rules, format=format)
    assert caught.value.tensor == "lm_head" and "embed_tokens" not in str(caught.value)
    rules["lm_head"] = "none"
    written = pymllm.quantize_checkpoint(tmp_path / "in.gguf", tmp_path / "out", rules, format=format)
    assert not written.notes and "lm_head.weight" not in load_tensors(tmp_path / "out")
    ids = torch.arange(9)
    direct = pymllm.load_model(tmp_path / "in.gguf", rules, dtype="float32")
    assert relative_error(
        logits_of(pymllm.load_model(tmp_path / "out", dtype="float32"), ids), logits_of(direct, ids)
    ) < (0.01)


# The tokenizer


def test_the_shipped_model_comes_with_its_tokenizer_and_chat_template(tmp_path):
    pymllm.quantize_checkpoint(shipped_model(), tmp_path / "out.gguf", {"**": "gguf:type=Q8_0"})
    llm, source = pymllm.LLM(tmp_path / "out.gguf", dtype="float32"), pymllm.LLM(shipped_model())
    for text in ("def f(x):\n    return x", "naïve 日本 <|im_start|>user\n"):
        assert llm.tokenizer.encode(text) == source.tokenizer.encode(text)
    messages = [{"role": "user", "content": "hi"}]
    assert llm.tokenizer.apply_chat_template(messages) == source.tokenizer.apply_chat_template(messages)
    assert field(tmp_path / "out.gguf", "tokenizer.ggml.pre") == "gpt-2"
    assert field(tmp_path / "out.gguf", "tokenizer.ggml.eos_token_id") == 2
    types = field(tmp_path / "out.gguf", "tokenizer.ggml.token_type")
    assert types[:5] == [3, 3, 3, 3, 1]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    assert theirs.encode("def f(x):\n    return x") == source.tokenizer.encode("def f(x):\n    return x")


def library_tokenizer(kind: str):
    """A small tokenizer as `tokenizers` makes it, trained on a few words."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    from pymllm.text.gguf_tokenizer import LLAMA3, QWEN2, SPACE, TEKKEN

    texts = ["the theme of these tests: 1234 words, it's there", "def thesis(x):\n    return these + 12"] * 4
    if kind == "sentencepiece":
        built = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        built.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        built.decoder = decoders.Sequence(
            [
                decoders.Replace(SPACE, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special)
        built.train_from_iterator(texts, trainer)
        data = json.loads(built.to_str())
        data["added_tokens"] = data["added_tokens"][:3]
        return Tokenizer.from_str(json.dumps(data))
    if kind == "unigram":
        return Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    splits = {
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "smollm": [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ],
        "odd": [pre_tokenizers.Split(Regex("x+"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)],
    }
    for name, pattern in {"llama-bpe": LLAMA3, "qwen2": QWEN2, "tekken": TEKKEN}.items():
        splits[name] = [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    built = Tokenizer(models.BPE(ignore_merges=kind in ("llama-bpe", "tekken")))
    built.pre_tokenizer = pre_tokenizers.Sequence(splits[kind])
    if kind == "qwen2":
        built.normalizer = normalizers.NFC()
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    built.train_from_iterator(texts, trainer)
    return built


def with_tokenizer(folder, kind: str, **settings):
    there = write_checkpoint(folder, "llama", "none", vocab_size=352, num_hidden_layers=1)
    library_tokenizer(kind).save(str(folder / "tokenizer.json"))
    names = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "chat_template": "{{ messages }}",
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return there


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "sentencepiece"])
def test_tokenizers_are_written_under_the_name_of_their_split(kind, tmp_path):
    there = with_tokenizer(tmp_path / "in", kind)
    pymllm.quantize_checkpoint(there.folder, tmp_path / "out.gguf", {BLOCKS: "none"})
    spm = kind == "sentencepiece"
    assert field(tmp_path / "out.gguf", "tokenizer.ggml.model") == ("llama" if spm else "gpt2")
    assert field(tmp_path / "out.gguf", "tokenizer.ggml.pre") == ("default" if spm else kind)
    assert field(tmp_path / "out.gguf", "tokenizer.chat_template") == "{{ messages }}"
    types = field(tmp_path / "out.gguf", "tokenizer.ggml.token_type")
    assert len(types) == 352 and types[-1] == 5 and (types[10] == 6) == spm
    with GGUFFile.open(tmp_path / "out.gguf") as file:
        back = GGUFTokenizer(tmp_path / "out.gguf", file.metadata)
        source = Tokenizer(there.folder)
        for text in ("these tests 4321 it's", "  x é\n\n日本 return"):
            assert back.encode(text) == source.encode(text)
            assert back.decode(back.encode(text)) == source.decode(source.encode(text))


@pytest.mark.parametrize(
    ("kind", "needle"), [("odd", r"text split by \['x\+'\]"), ("unigram", "its model is Unigram")]
)
def test_a_tokenizer_that_gguf_has_no_kind_for_is_refused_before_any_work(kind, needle, tmp_path):
    there = with_tokenizer(tmp_path / "in", kind)
    with pytest.raises(ConfigError, match=needle) as caught:
        pymllm.quantize_checkpoint(there.folder, tmp_path / "out.gguf", {BLOCKS: "none"})
    assert caught.value.code == "tokenizer-unknown" and os.listdir(tmp_path) == ["in"]


# What cannot be written


@pytest.mark.parametrize(
    ("family", "rules", "settings", "needle"),
    [
        ("llama", {BLOCKS: "int4:group_size=32"}, {}, r"gguf:type=Q4_K.*q_proj=none"),
        ("llama", {BLOCKS: "fp8"}, {}, "fp8 e4m3"),
        ("llama", {BLOCKS: "gguf"}, {}, "Q4_K.s blocks of 256"),
        ("llama", {BLOCKS: "none"}, {"hidden_act": "gelu"}, "hidden_act"),
        ("gemma2", {BLOCKS: "none"}, {}, "query_pre_attn_scalar.* has no word for it, and means 32"),
        ("gemma3_text", {BLOCKS: "none"}, {}, "query_pre_attn_scalar.* has no word for it, and means 32"),
        (
            "qwen2",
            {BLOCKS: "none"},
            {"use_sliding_window": True, "max_window_layers": 1},
            "window of layer 1",
        ),
    ],
)
def test_what_a_file_cannot_say_is_refused_before_any_work(family, rules, settings, needle, tmp_path):
    there = write_checkpoint(tmp_path / "in", family, "none", **settings)
    with pytest.raises(ConfigError, match=needle):
        pymllm.quantize_checkpoint(there.folder, tmp_path / "out.gguf", rules)
    assert os.listdir(tmp_path) == ["in"]


def test_the_path_and_the_format_must_go_together(tmp_path):
    there = write_checkpoint(tmp_path / "in", "llama", "none")
    for out, format in (("out", "gguf"), ("out.gguf", "awq")):
        with pytest.raises(ConfigError, match="one file"):
            pymllm.quantize_checkpoint(there.folder, tmp_path / out, {BLOCKS: "none"}, format=format)
    (tmp_path / "there.gguf").write_text("mine")
    (tmp_path / "folder.gguf").mkdir()
    for out in ("there.gguf", "folder.gguf", "there.gguf/below.gguf"):
        with pytest.raises(ConfigError) as caught:
            pymllm.quantize_checkpoint(there.folder, tmp_path / out, {BLOCKS: "none"})
        assert caught.value.code == "out-exists"
    assert (tmp_path / "there.gguf").read_text() == "mine"


def test_integers_of_other_formats_are_kept_where_a_block_says_them_exactly(tmp_path):
    floats = write_checkpoint(tmp_path / "in", "llama", "none")
    rules = {"**.mlp.**": "int4:group_size=64,symmetric=true", BLOCKS: "int8"}
    pymllm.quantize_checkpoint(floats.folder, tmp_path / "integers", rules)
    written = pymllm.quantize_checkpoint(
        tmp_path / "integers", tmp_path / "out.gguf", {"**.v_proj": "gguf:type=Q5_1"}
    )
    methods = {layer.prefix.rpartition(".")[2]: layer.method for layer in written.layers}
    assert (methods["up_proj"], methods["q_proj"], methods["v_proj"]) == (
        "gguf Q4_0",
        "gguf Q8_0",
        "gguf Q5_1",
    )
    theirs, found = load_tensors(tmp_path / "integers"), read(tmp_path / "out.gguf")
    for stored, name, bits in (("mlp.up_proj", "ffn_up", 4), ("self_attn.o_proj", "attn_output", 8)):
        expected = decode_compressed(theirs, f"model.layers.0.{stored}", bits).float()
        assert np.array_equal(found[f"blk.0.{name}.weight"][1], expected.numpy())


# Stopping and going on


@pytest.mark.parametrize("point", ["write_tensors", "write_whole", "single write_whole", "os.replace"])
def test_a_stopped_run_goes_on_and_gives_the_same_file(point, tmp_path, monkeypatch):
    there = write_checkpoint(tmp_path / "in", "llama", "none")
    rules = {BLOCKS: "gguf:type=Q4_0"}
    pymllm.quantize_checkpoint(there.folder, tmp_path / "whole.gguf", rules)
    owner = {"single write_whole": single_file, "os.replace": os}.get(point, output)
    reached = 0
    for allowed in range(40):
        with monkeypatch.context() as patch:
            stop_at(patch, owner, point.rpartition(" ")[2].removeprefix("os."), 1 + allowed)
            try:
                written = pymllm.quantize_checkpoint(there.folder, tmp_path / "out.gguf", rules)
                break
            except Stop:
                reached += 1
                assert point == "os.replace" or not (tmp_path / "out.gguf").exists()
    assert reached > 0 and written.path == str(tmp_path / "out.gguf")
    assert sorted(os.listdir(tmp_path)) == ["in", "out.gguf", "whole.gguf"]
    one, other = ((tmp_path / name).read_bytes() for name in ("out.gguf", "whole.gguf"))
    assert one.replace(b"out", b"whole") == other or one == other
