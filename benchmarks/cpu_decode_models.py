"""The model of cpu_decode.py in each engine's own format, from one set of random weights.

The model is a Llama of 448 M parameters. All of its files lie in a folder outside the repository (about 4 GB in all);
each is written once, by the interpreter that has the packages for it.
"""

# O out_features, I in_features, G group_size

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
GROUP = 128
STANDARD_DEVIATION = 0.02  # as models are initialised
LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def linear_shapes() -> dict[str, tuple[int, int]]:
    """List the checkpoint name of every linear layer, with its [O, I]."""
    hidden, inner, head = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    queries, keys = CONFIG["num_attention_heads"] * head, CONFIG["num_key_value_heads"] * head
    sizes = ((queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries))
    sizes += ((inner, hidden), (inner, hidden), (hidden, inner))
    layers = range(CONFIG["num_hidden_layers"])
    return {
        f"model.layers.{i}.{name}": shape for i in layers for name, shape in zip(LINEARS, sizes, strict=True)
    }


def write_float(folder: Path) -> None:
    """Write the weights in bfloat16, as transformers writes a checkpoint."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape).normal_(0, STANDARD_DEVIATION, generator=generator).bfloat16()

    hidden = CONFIG["hidden_size"]
    tensors = {"model.embed_tokens.weight": random(CONFIG["vocab_size"], hidden)}
    tensors |= {f"{name}.weight": random(*shape) for name, shape in linear_shapes().items()}
    norms = [
        f"model.layers.{i}.{name}"
        for i in range(CONFIG["num_hidden_layers"])
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    tensors |= {f"{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in [*norms, "model.norm"]}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))


def write_awq(folder: Path) -> None:
    """Write every linear layer of the blocks in AWQ int4; the embedding stays bfloat16, and a rule quantises it."""
    from safetensors.torch import load_file, save_file

    from pymllm.kernels.canonical import IntWeight
    from pymllm.quantization.formats.awq import pack_columns

    tensors = load_file(model_folder(folder.parent, "float") / "model.safetensors")
    for name in linear_shapes():
        weight = tensors.pop(f"{name}.weight")
        coded = IntWeight.from_float(weight.float(), bits=4, group_size=GROUP, symmetric=False)
        assert coded.zeros is not None
        tensors[f"{name}.qweight"] = pack_columns(coded.codes)
        tensors[f"{name}.qzeros"] = pack_columns(coded.zeros)
        tensors[f"{name}.scales"] = coded.scales.half().t().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}
    quantization["version"] = "gemm"
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}, indent=1))


def write_gguf(folder: Path) -> None:
    """Write Q4_0 everywhere, embedding and head included, as llama-quantize --pure does."""
    import gguf
    import numpy as np
    from safetensors import safe_open

    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_rope_dimension_count(CONFIG["head_dim"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    writer.add_vocab_size(CONFIG["vocab_size"])
    writer.add_tokenizer_model("none")  # ids go in and come out
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
    }
    with safe_open(model_folder(folder.parent, "float") / "model.safetensors", framework="pt") as checkpoint:
        for name in checkpoint.keys():  # noqa: SIM118 (not a dict)
            data = checkpoint.get_tensor(name).float().numpy()
            stem = name.removesuffix(".weight")
            layer = ""
            if stem.startswith("model.layers."):
                index, stem = stem.removeprefix("model.layers.").split(".", 1)
                layer = f"blk.{index}."
            if stem in ("self_attn.q_proj", "self_attn.k_proj"):  # llama.cpp rotates neighbours, not halves
                half = CONFIG["head_dim"] // 2
                data = data.reshape(-1, 2, half, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
            kind = gguf.GGMLQuantizationType.F32
            if data.ndim == 2:
                kind = gguf.GGMLQuantizationType.Q4_0
                data = gguf.quantize(np.ascontiguousarray(data), kind)
            writer.add_tensor(f"{layer}{names[stem]}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_onnx(folder: Path) -> None:
    """Write int4 in blocks of 128 with int8 activations, by onnxruntime-genai's own builder.

    The embedding, which is read a row at a time, stays float32: if it is shared with an asymmetric head, the model does
    not load.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    source, cache = folder / "source", folder / "cache"
    source.mkdir()
    for file in model_folder(folder.parent, "float").iterdir():
        (source / file.name).symlink_to(file)
    # The builder asks for a tokenizer, which nothing uses later.
    words = WordLevel({f"<{i}>": i for i in range(CONFIG["vocab_size"])}, unk_token="<0>")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(source)
    options = {
        "block_size": GROUP,
        "accuracy_level": 4,
        "is_symmetric": "false",
        "shared_embeddings": "false",
    }
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(folder)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(cache), "--extra_options"]
    subprocess.run([*command, *(f"{key}={value}" for key, value in options.items())], check=True)
    for used in (source, cache):
        shutil.rmtree(used, ignore_errors=True)


def write_openvino(folder: Path) -> None:
    """Write u4 weights in groups of 128 with zero points and a stateful key-value cache, as OpenVINO's exporters do."""
    from cpu_decode_openvino import write_model

    write_model(folder, model_folder(folder.parent, "float") / "model.safetensors", CONFIG, GROUP)


WRITERS: dict[str, Callable[[Path], None]] = {
    "float": write_float,
    "awq": write_awq,
    "gguf": write_gguf,
    "onnx": write_onnx,
    "openvino": write_openvino,
}


def model_folder(root: Path, kind: str) -> Path:
    """Return the folder of the model in the format `kind`, which is written now if it is not there."""
    folder, partial = root / kind, root / f"{kind}.partial"
    if not folder.exists():
        if kind != "float":
            model_folder(root, "float")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        WRITERS[kind](partial)
        partial.rename(folder)
    return folder
