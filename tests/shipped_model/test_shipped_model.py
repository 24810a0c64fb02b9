"""The model folder inside the package is a sound checkpoint, and the model in it has learnt Python.

The int4 layout is read here by a few lines of numpy, independent of pymllm and of the script which wrote it.
"""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parents[2] / "pymllm" / "shipped_model"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
GROUP_SIZE = 128
# Column j of a word's eight lies in nibble NIBBLE_OF_COLUMN[j], counted from the low end.
NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((FOLDER / "config.json").read_text())


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return load_file(FOLDER / "model.safetensors")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def linear_shapes(config: dict) -> dict[str, tuple[int, int]]:
    """[in_features, out_features] of every linear layer of the blocks, by its name in the checkpoint."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    of_a_layer = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }
    layers = range(config["num_hidden_layers"])
    return {f"model.layers.{layer}.{name}": shape for layer in layers for name, shape in of_a_layer.items()}


def unpack(words: np.ndarray, nibble_of_column: tuple[int, ...]) -> np.ndarray:
    """[rows, columns/8] int32 to [rows, columns] codes 0..15."""
    unsigned = words.view(np.uint32)
    columns = [(unsigned >> np.uint32(4 * nibble)) & np.uint32(15) for nibble in nibble_of_column]
    return np.stack(columns, axis=-1).reshape(len(words), -1)


def dequantized_state(
    tensors: dict[str, np.ndarray],
    linears: dict[str, tuple[int, int]],
    nibble_of_column: tuple[int, ...] = NIBBLE_OF_COLUMN,
) -> dict[str, torch.Tensor]:
    """The state dict of a float32 LlamaForCausalLM."""
    state = {
        name: torch.from_numpy(t.astype(np.float32))
        for name, t in tensors.items()
        if name.endswith(".weight")
    }
    for name in linears:
        codes = unpack(tensors[f"{name}.qweight"], nibble_of_column).astype(np.float32)
        zeros = (
            unpack(tensors[f"{name}.qzeros"], nibble_of_column).astype(np.float32).repeat(GROUP_SIZE, axis=0)
        )
        scales = tensors[f"{name}.scales"].astype(np.float32).repeat(GROUP_SIZE, axis=0)
        state[f"{name}.weight"] = torch.from_numpy(((codes - zeros) * scales).T.copy())
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


@pytest.fixture(scope="module")
def float_model(config, tensors) -> LlamaForCausalLM:
    shape = {
        key: value
        for key, value in config.items()
        if key not in ("quantization_config", "dtype", "torch_dtype")
    }
    model = LlamaForCausalLM(LlamaConfig(**shape)).float().eval()
    model.load_state_dict(dequantized_state(tensors, linear_shapes(config)))
    return model


def test_the_folder_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12e6


def test_config_declares_awq_gemm_int4(config):
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["torch_dtype"] == config["dtype"] == "float16"
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP_SIZE,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }


def test_every_linear_has_three_tensors_of_the_right_shape_and_no_others_are_quantised(config, tensors):
    hidden = config["hidden_size"]
    expected = {
        "model.embed_tokens.weight": ("float16", (config["vocab_size"], hidden)),
        "model.norm.weight": ("float16", (hidden,)),
    }
    for layer in range(config["num_hidden_layers"]):
        expected[f"model.layers.{layer}.input_layernorm.weight"] = ("float16", (hidden,))
        expected[f"model.layers.{layer}.post_attention_layernorm.weight"] = ("float16", (hidden,))
    for name, (inputs, outputs) in linear_shapes(config).items():
        expected[f"{name}.qweight"] = ("int32", (inputs, outputs // 8))
        expected[f"{name}.qzeros"] = ("int32", (inputs // GROUP_SIZE, outputs // 8))
        expected[f"{name}.scales"] = ("float16", (inputs // GROUP_SIZE, outputs))
    assert {name: (str(t.dtype), t.shape) for name, t in tensors.items()} == expected


def test_all_floats_are_finite_and_all_scales_positive(tensors):
    for name, tensor in tensors.items():
        if tensor.dtype == np.float16:
            assert np.isfinite(tensor).all(), name
        if name.endswith(".scales"):
            assert (tensor > 0).all(), name


@pytest.mark.parametrize("module", ["textwrap.py", "json/encoder.py"])
def test_tokenizer_round_trips_python_source(tokenizer, module):
    source = (STDLIB / module).read_text(encoding="utf-8")
    assert tokenizer.decode(tokenizer.encode(source)) == source


def test_tokenizer_round_trips_text_outside_its_training(tokenizer):
    text = "π ≈ 3.14159\t# 日本語 🙂\r\n\x00"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_single_ids_and_agree_with_both_configs(config, tokenizer):
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]
    ids = [tokenizer.encode(token)[0] for token in ("<|endoftext|>", "<|im_end|>", "<|pad|>")]
    assert ids == [config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]]
    assert set(generation["eos_token_id"]) == {config["bos_token_id"], config["eos_token_id"]}


def test_chat_template_opens_the_assistants_turn(tokenizer):
    messages = [{"role": "user", "content": "Write a function `add`."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nWrite a function `add`.<|im_end|>\n<|im_start|>assistant\n"


def held_out_loss(model: LlamaForCausalLM, tokenizer, module: str) -> float:
    """Nats per token on the first 512 tokens of a library module kept out of training."""
    source = (STDLIB / module).read_text(encoding="utf-8")
    tokens = torch.tensor([tokenizer.encode(source)[:512]])
    with torch.no_grad():
        return model(input_ids=tokens, labels=tokens).loss.item()


@pytest.mark.parametrize("module", ["textwrap.py", "queue.py", "shlex.py"])
def test_held_out_source_scores_far_below_uniform(float_model, tokenizer, module):
    # Uniform is ln 4096 = 8.3. Scales of a neighbouring column give 5.2, zero points left out 9.6.
    assert held_out_loss(float_model, tokenizer, module) < 4.0


def test_the_bound_on_the_loss_notices_a_wrong_nibble_order(float_model, config, tensors, tokenizer):
    model = LlamaForCausalLM(float_model.config).eval()
    model.load_state_dict(dequantized_state(tensors, linear_shapes(config), nibble_of_column=tuple(range(8))))
    assert held_out_loss(model, tokenizer, "textwrap.py") > 4.0
