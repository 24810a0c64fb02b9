"""The good checkpoints that are changed: tiny, of every format and several families, and what each answers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pymllm
from pymllm.engine.runner import Runner
from pymllm.loading.load import load_prepared
from pymllm.loading.prepare import prepare

IDS = [3, 1, 4, 1, 5]
# No two sizes alike, so that few tensors have a shape that means as much the other way round.
SIZES: dict[str, Any] = {
    **{"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
    **{"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 48, "max_position_embeddings": 64},
}
MOE = SIZES | {"moe_intermediate_size": 64, "num_hidden_layers": 1}
LAYOUT = "layout.json"

Write = Callable[[Path], Any]


# What transformers writes of a Llama.
LLAMA: dict[str, Any] = {
    **{
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
        "hidden_act": "silu",
    },
    **{"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "pretraining_tp": 1, "rms_norm_eps": 1e-5},
    **{"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "tie_word_embeddings": False},
    **{"transformers_version": "5.0.0", "use_cache": True},
}


def llama_weights(sizes: Mapping[str, Any]) -> dict[str, Tensor]:
    """Make the random weights of a Llama, by name, without transformers, whose import takes seconds."""
    generator = torch.Generator().manual_seed(0)
    hidden, inner, vocab = (sizes[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    queries, keys = (sizes[f"num_{name}_heads"] * sizes["head_dim"] for name in ("attention", "key_value"))
    shapes = {"self_attn.q": (queries, hidden), "self_attn.k": (keys, hidden), "self_attn.v": (keys, hidden)}
    shapes |= {"self_attn.o": (hidden, queries), "mlp.gate": (inner, hidden), "mlp.up": (inner, hidden)}
    shapes |= {"mlp.down": (hidden, inner)}
    weights = {"model.embed_tokens.weight": torch.randn(vocab, hidden, generator=generator)}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        weights[f"model.layers.0.{name}_proj.weight"] = noise * shape[1] ** -0.5
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        weights[f"model.{name}.weight"] = 1 + 0.1 * torch.randn(hidden, generator=generator)
    weights["lm_head.weight"] = torch.randn(vocab, hidden, generator=generator) * hidden**-0.5
    return weights


def llama(folder: Path, writer: Any, shards: int = 1, seed: int = 0) -> None:
    """Write a Llama whose decoder is stored as a writer does it."""
    from ..checkpoints import FORMATS, save_tensors

    writer = FORMATS[writer] if isinstance(writer, str) else writer
    tensors: dict[str, Tensor] = {}
    for name, weight in llama_weights(SIZES).items():
        layer, _, _ = name.rpartition(".")
        stored = writer.encode(weight)[0] if layer.endswith("_proj") else {"weight": weight * (1 + seed)}
        tensors |= {f"{layer}.{key}": tensor for key, tensor in stored.items()}
    settings = writer.config(())
    folder.mkdir(parents=True)
    config = LLAMA | SIZES | ({} if settings is None else {"quantization_config": settings})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_tensors(folder, tensors, shards)


def _dense(folder: Path, family: str, writer: Any = "none", **options: Any) -> None:
    from ..checkpoints import write_checkpoint

    write_checkpoint(folder, family, writer, **(SIZES | options))


def _formats() -> dict[str, Write]:
    from ..checkpoints import AWQ, FP8, CompressedFP8
    from ..moe_checkpoints import MXFP4 as CodesOfBytes
    from ..quantization.test_auto_round_fp8 import Fp8
    from ..quantization.test_bitsandbytes import EightBit, FourBit
    from ..quantization.test_fbgemm_fp8 import Fbgemm
    from ..quantization.test_hqq import HQQ
    from ..quantization.test_modelopt import FP8 as ModelOptFP8
    from ..quantization.test_modelopt import NVFP4
    from ..quantization.test_modelopt_algorithms import Fp4, Int4, Int8
    from ..quantization.test_mxfp8 import MXFP8
    from ..quantization.test_quark import Quark, QuarkBlocks, QuarkIntegers
    from ..quantized import GPTQ, CompressedInt

    marks = (("packing_format", "auto_round:auto_gptq"), ("quant_method", "auto-round"))
    writers: dict[str, Any] = {
        "none": "none",
        "awq": AWQ(32),
        "awq-symmetric": AWQ(32, symmetric=True),
        "gptq": GPTQ(),
        "auto-round-gptq": GPTQ(negative=True, marks=marks),
        "auto-round-fp8": Fp8(32),
        "bitsandbytes-4": FourBit(),
        "bitsandbytes-4-double": FourBit(double=True),
        "bitsandbytes-8": EightBit(),
        "compressed-fp8-channel": CompressedFP8("channel"),
        "compressed-fp8-static": CompressedFP8("tensor", static=True),
        "compressed-fp8-block": CompressedFP8("block", block=(32, 32)),
        "compressed-int8": CompressedInt(),
        "compressed-int8-zeros": CompressedInt(zero_points=True, said=False),
        "compressed-int4": CompressedInt(4, packed=True),
        "compressed-int4-zeros": CompressedInt(4, zero_points=True, said=False, packed=True),
        "fbgemm-fp8": Fbgemm(),
        "fp8-block": FP8((32, 32)),
        "fp8-static": FP8(None, static=True),
        "hqq": HQQ(4, 32),
        "modelopt-fp8": ModelOptFP8(),
        "modelopt-nvfp4": NVFP4(),
        "modelopt-int4": Int4(),
        "modelopt-int8": Int8(),
        "modelopt-fp4": Fp4("W4A8_NVFP4_FP8"),
        "mxfp4": CodesOfBytes(),
        "mxfp8": MXFP8("mxfp8"),
        "quark-fp8": Quark(),
        "quark-block": QuarkBlocks((32, 32)),
        "quark-int4": QuarkIntegers(),
        "quark-int8": QuarkIntegers("int8"),
    }
    return {name: partial(llama, writer=writer) for name, writer in writers.items()}


def _mlx(folder: Path, bits: int, group: int, mode: str) -> None:
    from ..mlx_checkpoints import MLX, write_mlx

    setting = MLX(bits, group, mode)
    write_mlx(folder, "llama", lambda layer: setting, setting.settings(), **SIZES)


def _torchao(folder: Path, encode: str) -> None:
    from ..checkpoints import edit_config
    from ..quantization import test_torchao

    llama(folder, "none")
    data = folder / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors, metadata = {}, {"format": "pt"}
    for name, tensor in load_file(data).items():
        layer = name.removesuffix(".weight")
        if not layer.endswith("_proj"):
            tensors[name] = tensor
            continue
        kind, stored, _, settings = getattr(test_torchao, encode)(tensor)
        tensors |= {f"{layer}._weight_{key}": value.contiguous() for key, value in stored.items()}
        metadata[name] = json.dumps({"_type": kind, "_data": settings, "_tensor_data_names": list(stored)})
    save_file(tensors, data, metadata)
    settings = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Any", "_data": {}}}}
    edit_config(folder, quantization_config=settings | {"modules_to_not_convert": None})


def _beside(folder: Path, fmt: str, file: str, wrap: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write a checkpoint whose settings are in a file beside config.json."""
    _formats()[fmt](folder)
    raw = json.loads((folder / "config.json").read_text())
    settings = raw.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    (folder / file).write_text(json.dumps(wrap(settings)))


def _modelopt_file(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    return {"producer": {"name": "modelopt", "version": "0.41.0"}, "quantization": kept}


def _moe(folder: Path, family: str, fmt: str = "none", **settings: Any) -> None:
    from ..moe_checkpoints import write_moe

    write_moe(folder, family, fmt, **settings)


def _blocks(folder: Path) -> None:
    from ..block_checkpoints import write_blocks

    write_blocks(folder, "sdar", **SIZES)


def _encoder(folder: Path, family: str) -> None:
    from ..embedding.encoders import make_model

    make_model(family, num_hidden_layers=1).save_pretrained(folder)


def _generation(folder: Path) -> None:
    llama(folder, "none")
    settings = {"bos_token_id": 1, "eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6}
    settings |= {"top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "max_new_tokens": 8}
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=1))


def _families() -> dict[str, Write]:
    two = {"num_hidden_layers": 2}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
    dense: dict[str, dict[str, Any]] = {
        "qwen2": {},
        "qwen3": {"tie_word_embeddings": True},
        "gemma2": two,
        "gemma3_text": two,
        "phi3": {},
        "olmo2": {},
        "granite": {},
        "glm4": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        },
        "mistral": {"sliding_window": 3, "rope_parameters": yarn},
        "qwen3_5_text": two | {"num_key_value_heads": 2},
    }
    made: dict[str, Write] = {
        name: partial(_dense, family=name, **options) for name, options in dense.items()
    }
    experts = SIZES | {"num_local_experts": 3}
    latent = MOE | {"num_key_value_heads": 4, "head_dim": 16, "kv_lora_rank": 64}
    return made | {
        "tied-awq": partial(_dense, writer="awq-g32", family="qwen3", tie_word_embeddings=True),
        "qwen2_moe": partial(_moe, family="qwen2_moe", **MOE),
        "qwen3_moe-fp8": partial(_moe, family="qwen3_moe", fmt="fp8-tensor", **MOE),
        "mixtral-awq": partial(_moe, family="mixtral", fmt="awq-g32", **experts),
        "gpt_oss-mxfp4": partial(_moe, family="gpt_oss", fmt="mxfp4", **experts),
        "granitemoe": partial(_moe, family="granitemoe", **experts),
        "deepseek_v3": partial(_moe, family="deepseek_v3", **latent),
        "sdar": _blocks,
        "bert": partial(_encoder, family="bert"),
        "modernbert": partial(_encoder, family="modernbert"),
        "generation": _generation,
    }


def subjects() -> dict[str, Write]:
    """Return what writes each good checkpoint, by its name."""
    return {
        **_formats(),
        "mlx-4": partial(_mlx, bits=4, group=32, mode="affine"),
        "mlx-8": partial(_mlx, bits=8, group=32, mode="affine"),
        "mlx-mxfp4": partial(_mlx, bits=4, group=32, mode="mxfp4"),
        "mlx-nvfp4": partial(_mlx, bits=4, group=16, mode="nvfp4"),
        **{
            f"torchao-{encode}": partial(_torchao, encode=encode)
            for encode in ("int8", "intx", "float8", "float8_tensor_dynamic")
        },
        "gptq-beside": partial(_beside, fmt="gptq", file="quantize_config.json", wrap=dict),
        "modelopt-beside": partial(
            _beside, fmt="modelopt-nvfp4", file="hf_quant_config.json", wrap=_modelopt_file
        ),
        **_families(),
    }


class Checkpoints:
    """Good checkpoints under a folder, each made when it is first asked for, and its answer."""

    def __init__(self, folder: Path, writers: Mapping[str, Write]) -> None:
        self.root, self.writers = folder, writers
        self.answers: dict[str, Tensor] = {}

    def folder(self, name: str) -> Path:
        """Return the folder of a good checkpoint."""
        folder = self.root / name
        if not folder.exists():
            made = self.root / f"{name}.{os.getpid()}"
            self.writers[name](made)
            made.rename(folder)
        return folder

    def answer(self, name: str, of: Callable[[Path], Tensor]) -> Tensor:
        """Return what a good checkpoint answers.  of: what asks it."""
        if name not in self.answers:
            self.answers[name] = of(self.folder(name))
        return self.answers[name]

    def copy(self, name: str, into: Path, changed: Mapping[str, bytes]) -> Path:
        """Make a checkpoint of a good one and the files that are changed; the others are links to its own."""
        for file in self.folder(name).iterdir():
            if file.name not in changed:
                os.link(file, into / file.name)
        for file_name, data in changed.items():
            (into / file_name).write_bytes(data)
        return into


def logits(path: Path) -> Tensor:
    """Return the logits of a few tokens: planned without data, then loaded, then run.  [T, V]"""
    prepared = prepare(path, device="cpu", dtype="float32")
    model = load_prepared(prepared, progress=False)
    if model.why_no_text is not None:
        return pymllm.LLM(path, device="cpu", dtype="float32", progress=False).embed([IDS], pooling="mean")
    return Runner(model, torch.device("cpu")).logits(IDS)


def logits_of_llm(path: Path) -> Tensor:
    """Return the logits of a few tokens as a user gets them: plan, tokenizer, engine and the defaults of sampling."""
    llm = pymllm.LLM(path, device="cpu", dtype="float32", progress=False)
    if not llm.generates:
        return llm.embed([IDS], pooling="mean")
    llm.default_params()
    return llm.logits(IDS)


def clear(folder: Path) -> None:
    """Empty a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
