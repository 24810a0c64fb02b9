"""Say what models need: bytes of weights, of keys and values, and how many GPUs. From plans of configs alone.

    python benchmarks/sizing.py [--gpu-gb 80] [--used 0.9] [--requests 16] [--context 8192]

Each model is written as config.json and a safetensors file that is a header and a hole: a plan reads headers alone, so
no weights are needed. The plan (for a GPU of sm90, which need not be there) gives the bytes of weights of each rank as
kernels hold them, and of a token's keys and values. The smallest number of GPUs is the smallest legal size whose rank,
with its share of so many requests of so many tokens, fits into so much of a GPU's memory. GB are 10^9 bytes. The script
writes results/sizing.json and .md.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import pymllm
from pymllm.api import shipped_model

RESULTS = Path(__file__).parent / "results"
CONTEXTS = (8192, 32768, 131072)
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "bfloat16",
    "head_dim": None,
}
# The published configs of these models, what decides sizes.
CONFIGS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
        **{"num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192},
        "tie_word_embeddings": True,
    },
    "Mistral-7B-v0.3": {
        **{
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        **{"num_key_value_heads": 8, "vocab_size": 32768, "max_position_embeddings": 32768},
        "tie_word_embeddings": False,
    },
    "Llama-3.1-70B": {
        **{
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
        },
        **{"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072},
        "tie_word_embeddings": False,
    },
}
# Rules for the layers of the decoder; the embedding and the head stay as they are.
METHODS: dict[str, dict[str, Any]] = {
    "as stored": {},
    "fp8": {"quant": {"model.layers.**": "fp8"}},
    "int4": {"quant": {"model.layers.**": "int4:group_size=64"}},
    "int4, KV fp8": {"quant": {"model.layers.**": "int4:group_size=64"}, "kv_cache": "fp8"},
}


def write_headers(folder: Path, config: dict[str, Any]) -> None:
    """Write a checkpoint of this config whose tensors are a hole in the file."""
    given = {key: value for key, value in {**LLAMA, **config}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(given))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def row(folder: Path, name: str, method: str, memory: float, requests: int, context: int) -> dict[str, Any]:
    """Plan one model with one method, and find the smallest number of GPUs."""
    plan = pymllm.plan(folder, device="cuda:sm90", dtype="bfloat16", **METHODS[method])
    config = json.loads((folder / "config.json").read_text())
    heads, positions = config["num_key_value_heads"], config["max_position_embeddings"]
    token = plan.totals["kv_cache_bytes_per_token"]
    by_size = {int(size): held for size, held in plan.tensor_parallel["weight_bytes_by_size"].items()}
    # Ranks beyond the heads of keys and values hold copies of them.
    needed = {
        size: held + token // min(size, heads) * requests * context for size, held in sorted(by_size.items())
    }
    return {
        "model": name,
        "method": method,
        "weight_bytes": plan.totals["weight_bytes"],
        "kv_bytes_per_token": token,
        "kv_bytes_by_context": {
            str(tokens): token * tokens if tokens <= positions else None for tokens in CONTEXTS
        },
        "gpus": next((size for size, held in needed.items() if held <= memory), None),
    }


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    lines = [
        "Weights as kernels hold them on a GPU of sm90; keys and values of one request, where the model knows so many "
        f"positions; GPUs of {args.gpu_gb:g} GB, of which {args.used:.0%} may be used, for {args.requests} requests of "
        f"{args.context} tokens together.",
        "",
        "| model | method | weights, GB | KV a token, KiB | KV of 8k, GB | of 32k | of 128k | GPUs |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in rows:
        contexts = " | ".join(
            "–" if held is None else f"{held / 1e9:.2f}" for held in one["kv_bytes_by_context"].values()
        )
        lines.append(
            f"| {one['model']} | {one['method']} | {one['weight_bytes'] / 1e9:.2f} | "
            f"{one['kv_bytes_per_token'] / 1024:.1f} | {contexts} | {one['gpus'] or 'none fits'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("gpu-gb", 80.0), ("used", 0.9), ("requests", 16), ("context", 8192)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    memory = args.gpu_gb * 1e9 * args.used
    asked = (memory, args.requests, args.context)
    rows = [row(shipped_model(), "shipped", "as stored", *asked)]
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_headers(Path(folder), config)
            rows += [row(Path(folder), name, method, *asked) for method in METHODS]
    text = table(rows, args)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "sizing.md").write_text(text)
    (RESULTS / "sizing.json").write_text(json.dumps({"settings": vars(args), "rows": rows}, indent=2) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
