"""GGUF models: their weights against the `gguf` package, their logits and tokens against transformers."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pymllm
from pymllm import LLM
from pymllm.errors import CheckpointError, ConfigError, PymllmError, ShardingError
from pymllm.parallel import Parallel, simulate
from pymllm.quantization.formats.gguf import GGUFConfig
from pymllm.quantization.storage.gguf_blocks import BLOCKS
from pymllm.weights.gguf_file import TYPES

from ..forward import logits_of
from ..gguf_files import SIZES, byte_tokens, encode, finish, write_gguf

IDS = torch.randint(0, SIZES["vocab_size"], (24,), generator=torch.Generator().manual_seed(7))


def theirs(model):
    with torch.no_grad():
        return model(IDS[None]).logits[0]


def distance(got, expected):
    return float((got - expected).norm() / expected.norm())


def mixed(name):
    """As llama.cpp mixes types in one file, with floats among them."""
    ends = {
        "attn_v.weight": "Q6_K",
        "ffn_down.weight": "Q5_K",
        "attn_q.weight": "Q4_0",
        "ffn_up.weight": "F16",
    }
    ends |= {"token_embd.weight": "Q8_0", "output.weight": "Q6_K", "blk.0.attn_k.weight": "BF16"}
    return next((kind for end, kind in ends.items() if name.endswith(end)), "Q4_K")


@pytest.mark.parametrize(
    ("family", "kinds"),
    [("llama", kind) for kind in (*BLOCKS, "F32", "F16", "BF16", mixed)]
    + [(family, kind) for family in ("qwen2", "qwen3", "olmo2") for kind in ("Q4_K", "Q5_0", mixed)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_logits_are_those_of_the_dequantised_weights(family, kinds, tmp_path):
    model = write_gguf(tmp_path / "m.gguf", family, kinds)
    llm = LLM(tmp_path / "m.gguf", device="cpu", dtype="float32")
    assert distance(llm.logits(IDS), theirs(model)) < 1e-5
    assert pymllm.verify(tmp_path / "m.gguf", device="cpu").ok
    assert "reference" not in {row.kernel for row in llm.plan.layers}


def test_every_type_of_blocks_that_a_file_may_have_is_decoded():
    stored = {kind[0]: kind[1:3] for kind in TYPES.values() if kind[1] > 1}
    assert stored == {name: (block.values, block.size) for name, block in BLOCKS.items()}


@pytest.mark.parametrize("kind", ("NVFP4", "Q4_K", "TQ1_0"))
def test_a_float_beside_the_blocks_multiplies_them(kind, tmp_path):
    """As llama.cpp's converter stores ModelOpt's weight_scale_2, and the scale of activations, which stay floats."""

    def add_scale(tensors):
        tensors["blk.0.ffn_up.scale"] = np.array([3.5], np.float32), "F32"
        tensors["blk.0.ffn_up.input_scale"] = np.array([0.1], np.float32), "F32"

    model = write_gguf(tmp_path / "m.gguf", "qwen2", kind, edit_tensors=add_scale)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 3.5
    llm = LLM(tmp_path / "m.gguf", device="cpu", dtype="float32")
    assert distance(llm.logits(IDS), theirs(model)) < 1e-5
    assert pymllm.verify(tmp_path / "m.gguf", device="cpu").ok


@pytest.mark.parametrize("kind", ("IQ4_XS", "IQ1_M", "TQ2_0", "MXFP4", "Q2_0"))
def test_a_type_that_is_only_read_is_swapped_and_written_in_another_format(kind, tmp_path):
    model = write_gguf(tmp_path / "m.gguf", "qwen2", kind)
    llm = LLM(tmp_path / "m.gguf", device="cpu", dtype="float32")
    before = llm.logits(IDS)
    undo = pymllm.swap(llm, "**.mlp.**", "int8")
    assert 1e-4 < distance(llm.logits(IDS), before) < 0.1
    undo.undo()
    assert torch.equal(llm.logits(IDS), before)
    rules = {"model.layers.**": "int8", "model.embed_tokens": "none", "lm_head": "none"}
    pymllm.quantize_checkpoint(tmp_path / "m.gguf", tmp_path / "out", rules)
    written = LLM(tmp_path / "out", device="cpu", dtype="float32")
    assert distance(written.logits(IDS), theirs(model)) < 0.1


@pytest.mark.parametrize("family", ("llama", "qwen2", "qwen3"))
def test_logits_are_those_of_transformers_own_reading_of_the_file(family, tmp_path):
    kinds = "Q8_0" if family == "llama" else "Q6_K"
    write_gguf(
        tmp_path / "m.gguf", family, kinds, head_dim=128 if family == "qwen3" else 64
    )  # not read there
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    llm = LLM(tmp_path / "m.gguf", device="cpu", dtype="float32")
    assert distance(llm.logits(IDS), theirs(model)) < 1e-5


def test_a_tied_head_shares_the_quantised_table(tmp_path):
    model = write_gguf(tmp_path / "m.gguf", "qwen3", "Q6_K", tie_word_embeddings=True)
    llm = LLM(tmp_path / "m.gguf", device="cpu", dtype="float32")
    assert llm.model.lm_head.shares_table
    assert distance(llm.logits(IDS), theirs(model)) < 1e-5


def test_rotary_frequencies_are_divided_by_the_files_factors(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }

    def add_factors(tensors):
        """As llama.cpp's converter computes them."""
        factors = []
        for i in range(0, 64, 2):
            wavelength = 2 * np.pi * 10000.0 ** (i / 64)
            if wavelength < 64 / 4:
                factors.append(1.0)
            elif wavelength > 64 / 1:
                factors.append(8.0)
            else:
                smooth = (64 / wavelength - 1) / (4 - 1)
                factors.append(1 / ((1 - smooth) / 8 + smooth))
        tensors["rope_freqs.weight"] = np.array(factors, np.float32), "F32"

    model = write_gguf(tmp_path / "m.gguf", kinds="Q8_0", edit_tensors=add_factors, rope_parameters=scaling)
    llm = LLM(tmp_path / "m.gguf", device="cpu", dtype="float32")
    assert distance(llm.logits(IDS), theirs(model)) < 1e-5
    assert distance(llm.logits(IDS), theirs(write_gguf(tmp_path / "plain.gguf", kinds="Q8_0"))) > 1e-3


@pytest.mark.parametrize("kind", ("linear", "yarn"))
def test_rotary_scaling_is_read_from_the_metadata(kind, tmp_path):
    scaling = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = 32

    def edit(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(32)

    model = write_gguf(tmp_path / "m.gguf", "qwen2", "Q8_0", edit=edit, rope_parameters=scaling)
    assert distance(LLM(tmp_path / "m.gguf", device="cpu", dtype="float32").logits(IDS), theirs(model)) < 1e-5


def test_a_model_in_several_files_is_opened_by_its_first(tmp_path):
    model = write_gguf(tmp_path / "m.gguf", kinds="Q5_1", split=9)
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) > 2
    assert distance(LLM(files[0], device="cpu", dtype="float32").logits(IDS), theirs(model)) < 1e-5
    with pytest.raises(CheckpointError, match=files[0].name):
        pymllm.plan(files[1])
    files[-1].rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=f"missing.*{files[-1].name}"):
        pymllm.plan(files[0])
    (tmp_path / files[-1].name).write_bytes(files[1].read_bytes())
    with pytest.raises(CheckpointError) as caught:
        pymllm.plan(files[0])
    assert caught.value.code == "split-disagrees"


@pytest.mark.parametrize(("family", "size"), (("llama", 2), ("qwen3", 2), ("llama", 4)))
def test_ranks_together_answer_as_one(family, size, tmp_path):
    """With 4 ranks, ranks share a key head, and an edge of the vocabulary is padded."""
    wide = {"intermediate_size": 1024, "num_attention_heads": 16, "vocab_size": 97}
    model = write_gguf(tmp_path / "m.gguf", family, mixed, tokenizer=False, **wide)

    def run(parallel):
        return logits_of(pymllm.load_model(tmp_path / "m.gguf", device="cpu", dtype="float32"), IDS)

    for logits in simulate(size, run):
        assert distance(logits, theirs(model)) < 1e-5


def test_a_rank_that_would_cut_a_block_is_refused_with_the_sizes_that_work(tmp_path):
    write_gguf(tmp_path / "m.gguf", kinds="Q4_K")  # o_proj: 256 inputs, one block
    with pytest.raises(ShardingError, match=r"work for this model: 1\.$"), Parallel(0, 2):
        pymllm.plan(tmp_path / "m.gguf")
    write_gguf(tmp_path / "m.gguf", kinds="Q4_0")
    with Parallel(0, 2):
        assert (
            pymllm.plan(tmp_path / "m.gguf").ok if hasattr(pymllm.plan(tmp_path / "m.gguf"), "ok") else True
        )


def test_rules_and_swap_take_a_gguf_model_like_any_other(tmp_path):
    model = write_gguf(tmp_path / "m.gguf", "qwen3", "Q8_0")
    llm = LLM(tmp_path / "m.gguf", {"**.mlp.**": "fp8"}, device="cpu", dtype="float32")
    methods = {row.prefix: row.method for row in llm.plan.layers}
    assert (
        methods["model.layers.0.mlp.down_proj"] == "fp8"
        and methods["model.layers.0.self_attn.q_proj"] == "gguf"
    )
    assert 1e-4 < distance(llm.logits(IDS), theirs(model)) < 0.1
    before = llm.logits(IDS)
    undo = pymllm.swap(llm, "**.self_attn.**", "int8")
    assert not torch.equal(llm.logits(IDS), before)
    undo.undo()
    assert torch.equal(llm.logits(IDS), before)


# --- tokenizer


TEXTS = ("hello world", "Hi  there, it's 2024!", "é ok <|end|> x", " hello", "", "12345 don't\n\n  x")


def test_a_byte_level_tokenizer_is_transformers_reading_of_the_file(tmp_path):
    write_gguf(tmp_path / "m.gguf", "qwen2", "Q8_0")
    ours = LLM(tmp_path / "m.gguf", device="cpu").tokenizer
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("hello", "it's<|end|>x", "hellohello", "12345!"):
        assert ours.encode(text) == reference.encode(text)
        assert ours.decode(ours.encode(text)) == text.replace("<|end|>", "")


def sentencepiece_vocabulary():
    """Bytes, characters, and merges whose order only the scores tell."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds, scores = [2, 3, 3, *[6] * 256], [0.0] * 259
    pieces = ["▁", "h", "e", "l", "o", "w", "r", "d", "▁h", "he", "ll", "lo", "▁hello", "llo", "hello", "▁w"]
    pieces += ["or", "wor", "▁world", "ld", "orld", "el", "ello", "▁he", "▁wor"]
    for rank, piece in enumerate(pieces):
        tokens.append(piece)
        kinds.append(1)
        scores.append(-1000.0 if len(piece) == 1 else -float((rank * 7) % 23))
    return [*tokens, "<tool>"], [*kinds, 4], [*scores, -1000.0]


def add_sentencepiece(writer):
    tokens, kinds, scores = sentencepiece_vocabulary()
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_scores(scores)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ bos_token }}{% for m in messages %}<tool>{{ m['content'] }}{% endfor %}")


def test_a_sentencepiece_tokenizer_merges_by_score_and_knows_every_byte(tmp_path):
    write_gguf(tmp_path / "m.gguf", kinds="Q8_0", tokenizer=False, edit=add_sentencepiece, vocab_size=288)
    llm = LLM(tmp_path / "m.gguf", device="cpu")
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("hello world", "hello", "whello hellohelloworld", "é!", "hold<tool>hello"):
        ids = llm.tokenizer.encode(text)
        if "<" not in text:  # after an added token llama.cpp puts a space again, transformers does not
            expected = reference.encode(text)
            assert ids == [1, *expected[expected[0] == 1 :]]  # transformers 5.20 leaves the first out
        assert ids[0] == 1
    assert llm.tokenizer.decode(llm.tokenizer.encode("hello éworld")) == "hello éworld"
    assert llm.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])[:2] == [1, 284]
    assert llm.engine.end_tokens == frozenset({2})


def test_text_is_generated_from_text(tmp_path):
    write_gguf(tmp_path / "m.gguf", "qwen2", "Q8_0")
    llm = LLM(tmp_path / "m.gguf", device="cpu", dtype="float32")
    params = llm.default_params(max_tokens=6, temperature=0.0)
    (by_text,), (by_ids,) = llm.generate("hello", params), llm.generate([llm.encode("hello")], params)
    assert by_text.token_ids == by_ids.token_ids and isinstance(by_text.text, str)


@pytest.mark.parametrize(
    "key, value", (("tokenizer.ggml.model", "bert"), ("tokenizer.ggml.pre", "no-such-split"))
)
def test_a_tokenizer_that_is_not_known_leaves_token_ids_working(key, value, tmp_path):
    def edit(writer):
        for name, text in (("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "qwen2")):
            writer.add_string(name, value if name == key else text)
        writer.add_token_list(byte_tokens())

    write_gguf(tmp_path / "m.gguf", kinds="Q8_0", tokenizer=False, edit=edit)
    llm = LLM(tmp_path / "m.gguf", device="cpu")
    assert llm.logits([1, 2]).shape == (2, 96)
    with pytest.raises(CheckpointError) as caught:
        llm.encode("hello")
    assert caught.value.code == "tokenizer-unknown" and value in str(caught.value)


# --- faults


def refusal(path) -> PymllmError:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        pymllm.load_model(path, device="cpu")
    return caught.value


@pytest.mark.parametrize(
    ("edit", "code", "said"),
    (
        (lambda w: w.add_logit_scale(2.0), "config-key", "llama.logit_scale"),
        (lambda w: w.add_expert_count(8), "config-key", "llama.expert_count"),
        (lambda w: w.add_causal_attention(False), "config-key", "attention.causal"),
        (
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            "config-value",
            "rope.scaling.type",
        ),
    ),
)
def test_a_setting_that_would_change_the_model_is_refused(edit, code, said, tmp_path):
    write_gguf(tmp_path / "m.gguf", edit=edit)
    error = refusal(tmp_path / "m.gguf")
    assert error.code == code and said in str(error)


def test_tensors_that_are_missing_misshapen_or_unexpected_are_listed_at_once(tmp_path):
    def spoil(tensors):
        tensors["blk.0.extra.weight"] = np.zeros((2, 2), np.float32), "F32"
        del tensors["blk.1.ffn_up.weight"]
        raw, kind = tensors["blk.1.attn_q.weight"]
        tensors["blk.1.attn_q.weight"] = raw[:-2], kind

    write_gguf(tmp_path / "m.gguf", kinds="Q8_0", edit_tensors=spoil)
    text = str(refusal(tmp_path / "m.gguf"))
    for said in (
        "blk.0.extra.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ):
        assert said in text


def test_an_unsupported_type_is_named_with_its_layer():
    with pytest.raises(ConfigError) as caught:
        GGUFConfig.from_config({"types": {"model.layers.0.mlp.up_proj": "Q8_1"}})
    for said in ("Q8_1", "model.layers.0.mlp.up_proj", "Q4_K", "IQ4_XS"):
        assert said in str(caught.value)


NAN = np.array([np.nan], np.float16).view(np.uint8)
# Type: what makes the scale of one of its blocks no number.
NO_NUMBERS = {
    "Q4_0": {0: NAN[0], 1: NAN[1]},
    "Q5_K": {2: NAN[0], 3: NAN[1]},
    "Q6_K": {208: NAN[0], 209: NAN[1]},
    "IQ4_XS": {0: 0x00, 1: 0x7C},  # infinite
    "IQ2_S": {0: NAN[0], 1: NAN[1]},
    "IQ1_M": {49: 0xFF, 51: 0xFF, 53: 0xFF, 55: 0xFF},
    "TQ1_0": {52: NAN[0], 53: NAN[1]},
    "Q1_0": {0: NAN[0], 1: NAN[1]},
    "MXFP4": {0: 255},
    "NVFP4": {3: 0x7F},
}


@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_a_scale_that_is_no_number_is_refused_and_a_zero_is_not(kind, tmp_path):
    def spoil(changed):
        def edit(tensors):
            raw, _ = encode(np.ones((512, 256), np.float32), kind)
            for at, byte in changed.items():
                raw[3, at] = byte
            tensors["blk.0.ffn_up.weight"] = raw, kind

        return edit

    write_gguf(tmp_path / "m.gguf", kinds="Q8_0", edit_tensors=spoil(NO_NUMBERS[kind]))
    error = refusal(tmp_path / "m.gguf")
    assert error.code == "bad-content" and error.tensor == "model.layers.0.mlp.up_proj.weight"
    write_gguf(tmp_path / "m.gguf", kinds="Q8_0", edit_tensors=spoil(dict.fromkeys(NO_NUMBERS[kind], 0)))
    pymllm.load_model(tmp_path / "m.gguf", device="cpu")


def test_a_negative_scale_of_nvfp4_which_has_no_sign_is_refused(tmp_path):
    def edit(tensors):
        raw, _ = encode(np.ones((512, 256), np.float32), "NVFP4")
        raw[3, 1] = 0xB8
        tensors["blk.0.ffn_up.weight"] = raw, "NVFP4"

    write_gguf(tmp_path / "m.gguf", kinds="Q8_0", edit_tensors=edit)
    assert refusal(tmp_path / "m.gguf").code == "bad-content"


def test_an_unknown_architecture_and_a_folder_of_gguf_files_say_what_to_do(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    finish(writer)
    error = refusal(tmp_path / "m.gguf")
    assert error.code == "architecture" and "qwen3" in str(error)
    assert str(tmp_path / "m.gguf") in str(refusal(tmp_path))
