"""How long a start takes, with and without kept packed weights: `python benchmarks/starts.py [--json FILE]`.

It writes an AWQ checkpoint of a 7 B shape with random codes (4096 wide, 11008 inside, groups of 128) into a temporary
folder, and runs each start in a process of its own, from the first import to 32 tokens: one that keeps, then off and
taken by turns. The rate at which this machine reads the same file from its page cache is measured in the same run.
`--gigabytes 0.5` takes fewer layers, and a smaller table of tokens below 2 GB.

Where others work on the machine, the processor's seconds and the page faults say more than the wall's. A guest whose
host takes free memory back pays for each page that is touched first, up to 2 s a GB.
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

HIDDEN, INTER, GROUP = 4096, 11008, 128
VOCAB, SMALL_VOCAB = 32000, 8000
EXPECTED = {"first, keeps": (False, True), "off": (False, False), "taken": (True, False)}  # taken, kept
START = """
import resource, sys, time
begun = time.perf_counter()
from pymllm import LLM, SamplingParams
imported, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
llm = LLM(sys.argv[1], packed_cache=sys.argv[2], progress=False)
loaded, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
prompt, tokens, first = list(range(1, 17)), [], None
for piece in llm.stream(prompt, SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)):
    first = first or time.perf_counter()
    if piece.output is not None:
        tokens = piece.output.token_ids
ended = time.perf_counter()
import json
print(json.dumps(dict(imports=imported - begun, load=loaded - imported, first=first - loaded,
                      cpu=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
                      faults=after.ru_minflt - before.ru_minflt, decode=31 / (ended - first),
                      taken=bool(llm.load_report.taken_from), kept=bool(llm.load_report.kept_in),
                      tokens=list(tokens))))
"""


def layers_of(gigabytes: float, vocab: int) -> int:
    """Count the layers of a model of about this size."""
    weights = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTER
    layer = weights // 2 + weights // GROUP * 5 // 2
    return max(1, round((gigabytes * 1e9 - 4 * vocab * HIDDEN) / layer))


def write_model(folder: Path, layers: int, vocab: int = VOCAB) -> int:
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
        "vocab_size": vocab,
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
        ("model.embed_tokens.weight", "F16", (vocab, HIDDEN)),
        ("lm_head.weight", "F16", (vocab, HIDDEN)),
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
    done = subprocess.run([sys.executable, "-c", START, str(model), cache], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"a start has failed with exit code {done.returncode}")
    return {**json.loads(done.stdout.splitlines()[-1]), "wall": time.perf_counter() - begun}


def main() -> None:
    """Measure, print a table, and write it as JSON where that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--gigabytes", type=float, default=3.9, help="about the size of the weights; default: 3.9, 32 layers"
    )
    parser.add_argument("--model", type=Path, help="a checkpoint to take, or to write where there is none")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model = args.model or Path(temporary) / "model"
        if not model.exists():
            vocab = VOCAB if args.gigabytes >= 2 else SMALL_VOCAB
            write_model(model, layers_of(args.gigabytes, vocab), vocab)
        weights = next(model.glob("*.safetensors"))
        rate, cache = read_rate(weights), str(Path(temporary) / "kept")
        runs = [{"what": "first, keeps", **start(model, cache)}]
        for _ in range(args.rounds):
            runs += [{"what": "off", **start(model, "off")}, {"what": "taken", **start(model, cache)}]
        size = weights.stat().st_size
    for run in runs:
        run["to_first_token"] = run["imports"] + run["load"] + run["first"]
        run["load_bytes_per_second"] = size / run["load"]
        run["share_of_page_cache"] = run["load_bytes_per_second"] / rate
    print(f"{size / 1e9:.2f} GB of weights; the page cache gives {rate / 1e9:.2f} GB/s. In seconds:\n")
    print(
        "| start | imports | load | its CPU | its faults | GB/s | of the page cache | first token | tokens/s |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for run in runs:
        print(
            f"| {run['what']} | {run['imports']:.2f} | {run['load']:.2f} | {run['cpu']:.2f} | {run['faults']} | "
            f"{run['load_bytes_per_second'] / 1e9:.2f} | {run['share_of_page_cache']:.0%} | "
            f"{run['to_first_token']:.2f} | {run['decode']:.2f} |"
        )
    wrong = [run["what"] for run in runs if (run["taken"], run["kept"]) != EXPECTED[run["what"]]]
    if wrong:
        sys.exit(f"\nThese starts have not kept or taken what they should: {', '.join(wrong)}.")
    same = all(run["tokens"] == runs[0]["tokens"] and len(run["tokens"]) == 32 for run in runs)
    print(f"\nThe 32 tokens of all starts are {'the same' if same else 'NOT the same'}.")
    if args.json:
        args.json.write_text(
            json.dumps(
                {"weight_bytes": size, "page_cache_bytes_per_second": rate, "runs": runs, "same": same},
                indent=1,
            )
        )
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()
