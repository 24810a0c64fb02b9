"""How long a start takes, with and without kept packed weights: `python benchmarks/starts.py [--json FILE]`.

It writes an AWQ checkpoint of a 7 B shape with random codes (4096 wide, 11008 inside, groups of 128) into a temporary
folder, and runs each start in a process of its own, from the first import to 32 tokens: one that keeps, then off and
taken by turns. The rate at which this machine reads the same file from its page cache is measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pymllm.api import shipped_model

HIDDEN, INTER, VOCAB, GROUP = 4096, 11008, 32000, 128
START = """
import sys, time
begun = time.perf_counter()
from pymllm import LLM, SamplingParams
imported = time.perf_counter()
llm = LLM(sys.argv[1], packed_cache=sys.argv[2], progress=False)
loaded = time.perf_counter()
prompt, tokens, first = list(range(1, 17)), [], None
for piece in llm.stream(prompt, SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)):
    first = first or time.perf_counter()
    if piece.output is not None:
        tokens = piece.output.token_ids
ended = time.perf_counter()
import json
print(json.dumps(dict(imports=imported - begun, load=loaded - imported, first=first - loaded,
                      decode=31 / (ended - first), taken=bool(llm.load_report.taken_from), tokens=list(tokens))))
"""


def write_model(folder: Path, layers: int) -> int:
    """Write the checkpoint.  Returns the bytes of its weights."""
    folder.mkdir(parents=True)
    for file in shipped_model().iterdir():
        if "tokenizer" in file.name or file.name == "generation_config.json":
            shutil.copy(file, folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "torch_dtype": "float16",
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "quantization_config": {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes: list[tuple[str, str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", "F16", (VOCAB, HIDDEN)),
        ("lm_head.weight", "F16", (VOCAB, HIDDEN)),
        ("model.norm.weight", "F16", (HIDDEN,)),
    ]
    for layer in range(layers):
        name = f"model.layers.{layer}"
        shapes += [
            (f"{name}.{norm}_layernorm.weight", "F16", (HIDDEN,)) for norm in ("input", "post_attention")
        ]
        for part, i, o in (
            *((f"self_attn.{p}_proj", HIDDEN, HIDDEN) for p in "qkvo"),
            ("mlp.gate_proj", HIDDEN, INTER),
            ("mlp.up_proj", HIDDEN, INTER),
            ("mlp.down_proj", INTER, HIDDEN),
        ):
            shapes += [
                (f"{name}.{part}.qweight", "I32", (i, o // 8)),
                (f"{name}.{part}.qzeros", "I32", (i // GROUP, o // 8)),
                (f"{name}.{part}.scales", "F16", (i // GROUP, o)),
            ]
    header, at = {}, 0
    for name, dtype, shape in shapes:
        size = int(np.prod(shape)) * (4 if dtype == "I32" else 2)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in shapes:
            count = int(np.prod(shape))
            if dtype == "I32":
                values = generator.integers(-(2**31), 2**31, count, dtype=np.int32)
            elif name.endswith("norm.weight"):
                values = np.ones(count, np.float16)
            elif name.endswith("scales"):
                values = (0.002 + 0.002 * generator.random(count, np.float32)).astype(np.float16)
            else:
                values = (generator.standard_normal(count, np.float32) * 0.02).astype(np.float16)
            out.write(values.tobytes())
    return at


def read_rate(file: Path) -> float:
    """Return how many bytes a second are read of a file that the page cache has."""
    buffer = bytearray(16 << 20)
    for _ in range(2):
        begun, total = time.perf_counter(), 0
        with open(file, "rb", buffering=0) as opened:
            while count := opened.readinto(buffer):
                total += count
        seconds = time.perf_counter() - begun
    return total / seconds


def start(model: Path, cache: str) -> dict:
    """Start once in a process of its own.  Returns what it printed, and its wall time."""
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", START, str(model), cache], capture_output=True, text=True, check=True
    )
    return {**json.loads(done.stdout.splitlines()[-1]), "wall": time.perf_counter() - begun}


def main() -> None:
    """Measure, print a table, and write it as JSON where that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--layers", type=int, default=32, help="of the model; 32 take 5.6 GB with its table and head"
    )
    parser.add_argument("--model", type=Path, help="a checkpoint to take, or to write where there is none")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model = args.model or Path(temporary) / "model"
        if not model.exists():
            write_model(model, args.layers)
        weights = next(model.glob("*.safetensors"))
        rate, cache = read_rate(weights), str(Path(temporary) / "kept")
        runs = [{"what": "first, keeps", **start(model, cache)}]
        for _ in range(args.rounds):
            runs += [{"what": "off", **start(model, "off")}, {"what": "taken", **start(model, cache)}]
    print(f"{weights.stat().st_size / 1e9:.2f} GB of weights; the page cache gives {rate / 1e9:.2f} GB/s\n")
    print("| start | imports | load | first token | wall | tokens/s | taken |\n|---|---|---|---|---|---|---|")
    for run in runs:
        print(
            f"| {run['what']} | {run['imports']:.2f} | {run['load']:.2f} | {run['first']:.2f} | {run['wall']:.2f} | "
            f"{run['decode']:.2f} | {run['taken']} |"
        )
    same = all(run["tokens"] == runs[0]["tokens"] and len(run["tokens"]) == 32 for run in runs)
    print(f"\nThe 32 tokens of all starts are {'the same' if same else 'NOT the same'}.")
    if args.json:
        args.json.write_text(
            json.dumps({"page_cache_bytes_per_second": rate, "runs": runs, "same": same}, indent=1)
        )


if __name__ == "__main__":
    main()
