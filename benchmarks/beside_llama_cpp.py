"""Hold a GGUF file's reading against llama.cpp's: token ids, perplexity, and what further methods cost.

    python benchmarks/beside_llama_cpp.py MODEL.gguf [--llama-python PYTHON] [--text FILE] [--tokens 3000]
        [--methods int8 int4 fp8 ...] [--write]

llama.cpp runs as the server of the package xllamacpp, in the Python interpreter PYTHON that has it.

1. Token ids of over 300 strings that are hard to split, with and without the tokens that a text begins with.
2. Perplexity of a text (this project's documentation), in windows of 512 tokens, alike for both: the exact one of the
   file's weights (all in float32), the usual one ("auto"), and llama.cpp's, which rounds activations to eight bits
   beside quantised weights.
3. For each method: the file is converted with `quantize_checkpoint`, the folder is loaded, and its next-token
   distributions are compared with those of the file's weights in float32.  METHOD@FORMAT: in that format.

The script prints a table; --write also puts it into results/beside_llama_cpp.md and .json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pymllm
from pymllm.errors import ConfigError

ROOT = Path(__file__).parents[1]
TEXT = ("README.md", "docs/structure.md", "docs/quantizing.md", "docs/serving.md", "docs/moe.md")
WINDOW = 512
BLOCKS = "model.layers.**"
METHODS = (
    "int8",
    "int4:group_size=64",
    "int4:group_size=32,scale=mse",
    "awq:group_size=64",
    "fp8",
    "fp8:granularity=block",
)
COMPARED_TOKENS = 1024  # of the text, for the methods
FORCED = (
    1e4  # a bias that makes the server sample one token; the probabilities that it reports are without it
)
SERVER = """
import sys, xllamacpp as x
p = x.CommonParams()
p.model.path, p.n_ctx, p.n_parallel, p.warmup = sys.argv[1], int(sys.argv[2]), 1, False
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(sys.argv[3])
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = x.Server(p)
import importlib.metadata
print("READY", server.listening_address, importlib.metadata.version("xllamacpp"), flush=True)
sys.stdin.read()
"""


def hard_strings() -> list[str]:
    """Return strings that are hard to split: spaces, scripts, marks, digits, special tokens, long words."""
    found: list[str] = json.loads((Path(__file__).parent / "hard_strings.json").read_text())
    repeated = {
        "a": 300,
        "ab": 200,
        "x": 1000,
        "0": 200,
        " ": 100,
        "\n": 50,
        " \n": 40,
        ".": 120,
        "é": 150,
        "中": 120,
    }
    repeated |= {"😀": 40, "-": 80, "=": 79, "\t": 33, "supercalifragilisticexpialidocious": 5}
    found += [text * count for text, count in repeated.items()]
    found.append("A" * 128 + " " + "b" * 128)
    mixed = random.Random(0)
    pools = [
        "abcde ABC",
        "0123 45.",
        " \t\n\r",
        "éßñ öÜ",
        "абв где",
        "中文 字",
        "😀👍🏽 ❤️",
        "'s't 've",
        "<|im_end|>",
    ]
    pools += ["\u200b\u00a0\u3000 \u2028", "١٢٣ ابج", "\x00\x01\x7f\x85", "!?.,;:-_/\\|"]
    for _ in range(90):
        found.append("".join(mixed.choice(mixed.choice(pools)) for _ in range(mixed.randint(1, 60))))
    for _ in range(30):
        points = [point for point in mixed.sample(range(0x20000), 16) if not 0xD800 <= point < 0xE000]
        found.append("".join(chr(point) + mixed.choice(("", "", " ", "a", "1")) for point in points))
    return found


class LlamaCpp:
    """A running server of llama.cpp.  url: its address.  version: xllamacpp's."""

    def __init__(self, url: str, version: str) -> None:
        self.url, self.version = url, version

    def ask(self, path: str, **body: Any) -> Any:
        """Post a request and return the answer."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def tokens(self, text: str, *, special: bool) -> list[int]:
        """Encode a text, in which special tokens count as such.  special: with those that a text begins with."""
        return list(self.ask("/tokenize", content=text, add_special=special, parse_special=True)["tokens"])

    def log_probability(self, ids: list[int], following: int) -> float:
        """Return the log-probability, in nats, of a token after `ids`."""
        settings = {"n_predict": 1, "n_probs": 1, "temperature": 0.0, "logit_bias": [[following, FORCED]]}
        (answer,) = self.ask("/completion", prompt=ids, cache_prompt=True, **settings)[
            "completion_probabilities"
        ]
        if answer["id"] != following:
            raise RuntimeError(f"the server sampled {answer['id']}, not {following}")
        return float(answer["logprob"])


@contextmanager
def llama_cpp(python: str, model: Path) -> Iterator[LlamaCpp]:
    """Run the server in another interpreter."""
    command = [python, "-c", SERVER, str(model), str(2 * WINDOW), "1"]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        assert process.stdout is not None and process.stdin is not None
        for line in process.stdout:
            if line.startswith("READY"):
                _, url, version = line.split()
                yield LlamaCpp(url, version)
                process.stdin.close()
                return
        log.seek(0)
        raise SystemExit(f"llama.cpp does not run {model}:\n{log.read().decode(errors='replace')[-2000:]}")


def compare_tokens(llm: pymllm.LLM, theirs: LlamaCpp) -> dict[str, Any]:
    """Encode every string with both; returns how many there are, and those that differ."""
    differ = []
    for text in hard_strings():
        for special in (False, True):
            ours = llm.tokenizer.encode(text, add_special_tokens=special)
            expected = theirs.tokens(text, special=special)
            if ours != expected:
                differ.append({"text": text, "special": special, "ours": ours, "llama.cpp": expected})
    return {"strings": len(hard_strings()), "differ": differ}


def windows_of(ids: list[int]) -> Iterator[list[int]]:
    """Cut token ids into windows; the first token of each is given, the others are predicted."""
    for start in range(0, len(ids) - 1, WINDOW):
        yield ids[start : start + WINDOW + 1]


def perplexity(llm: pymllm.LLM, ids: list[int]) -> float:
    """Compute the perplexity of the text."""
    loss = sum(
        float(
            torch.nn.functional.cross_entropy(
                llm.logits(window[:-1]), torch.tensor(window[1:]), reduction="sum"
            )
        )
        for window in windows_of(ids)
    )
    return math.exp(loss / sum(len(window) - 1 for window in windows_of(ids)))


def perplexity_of_llama_cpp(theirs: LlamaCpp, ids: list[int]) -> float:
    """Compute llama.cpp's perplexity of the same windows."""
    found = [
        theirs.log_probability(window[:at], window[at])
        for window in windows_of(ids)
        for at in range(1, len(window))
    ]
    return math.exp(-sum(found) / len(found))


def distributions(llm: pymllm.LLM, ids: list[int]) -> list[Tensor]:
    """Compute log-probabilities [T, V] for each window."""
    return [llm.logits(window[:-1]).log_softmax(-1) for window in windows_of(ids)]


def compare_methods(model: Path, methods: list[str], ids: list[int]) -> list[dict[str, Any]]:
    """Convert the file with each method and compare its answers with those of the file's weights in float32."""
    reference = pymllm.LLM(model, device="cpu", dtype="float32", compute="exact")
    expected = distributions(reference, ids)
    # Not every format to write has a table of embeddings in codes.
    floats = ["model.embed_tokens=none"]
    floats += [] if reference.model.lm_head.tied_to is not None else ["lm_head=none"]
    rows = []
    for asked in methods:
        method, _, spelling = asked.partition("@")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / ("model.gguf" if spelling == "gguf" else "model")
            # Rules, where one method does not fit all layers: PATTERN=METHOD;PATTERN=METHOD.
            rules = [*(method.split(";") if method.startswith("**") else [f"{BLOCKS}={method}"]), *floats]
            try:
                pymllm.quantize_checkpoint(model, folder, rules, format=spelling or "auto", progress=False)
            except ConfigError as refusal:
                print(f"{asked}: {refusal}", flush=True)
                rows.append({"method": asked, "refused": str(refusal)})
                continue
            files = [folder] if folder.is_file() else list(folder.iterdir())
            size = sum(file.stat().st_size for file in files if file.is_file())
            llm = pymllm.LLM(folder, device="cpu", dtype="float32", compute="exact", progress=False)
            kl, same, count = 0.0, 0, 0
            for one, other in zip(expected, distributions(llm, ids), strict=True):
                kl += float((one.exp() * (one - other)).sum())
                same += int((one.argmax(-1) == other.argmax(-1)).sum())
                count += len(one)
        rows.append({"method": asked, "kl": kl / count, "top1": same / count, "bytes": size})
        print(f"{asked}: KL {kl / count:.5f} nats, first token the same at {same / count:.2%}", flush=True)
    return rows


def machine() -> dict[str, Any]:
    """Describe the machine and the packages."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    names = ("torch", "tokenizers")
    return {"cpu": cpu, "logical_cpus": os.cpu_count(), "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


def write_page(found: dict[str, Any]) -> list[str]:
    """Write the table's lines."""
    about, tokens, texts = found["machine"], found["tokens"], found["perplexity"]
    lines = [
        f"{found['model']}, {found['bytes'] / 1e6:.0f} MB; {about['cpu']}, {about['logical_cpus']} CPUs, "
        f"torch {about['torch']}, tokenizers {about['tokenizers']}, Python {about['python']}"
        + (f", xllamacpp {about['xllamacpp']}." if "xllamacpp" in about else "."),
        "",
    ]
    if tokens is not None:
        lines += [
            f"Token ids of {tokens['strings']} strings: {len(tokens['differ'])} differ from llama.cpp's.",
            "",
        ]
    lines += [f"Perplexity of {found['text_tokens']} tokens in windows of {WINDOW}:", ""]
    lines += ["| run | perplexity | against llama.cpp |", "| --- | --- | --- |"]
    base = texts.get("llama.cpp")
    lines += [
        f"| {name} | {value:.4f} | {'' if base is None else f'{value / base - 1:+.3%}'} |"
        for name, value in texts.items()
    ]
    lines += [
        "",
        f"Converted, against the file's weights in float32, over {found['compared_tokens']} tokens:",
        "",
    ]
    lines += ["| method | KL in nats | first token the same | folder |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {row['method']} | {row['kl']:.5f} | {row['top1']:.2%} | {row['bytes'] / 1e6:.0f} MB |"
        for row in found["methods"]
        if "kl" in row
    ]
    lines += [f"| {row['method']} | cannot be written | | |" for row in found["methods"] if "refused" in row]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--llama-python", help="the interpreter that has xllamacpp; without it, llama.cpp is left out"
    )
    parser.add_argument(
        "--text", type=Path, help="a text file; without it, the documentation of this project"
    )
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    text = args.text.read_text() if args.text else "\n".join((ROOT / name).read_text() for name in TEXT)
    llm = pymllm.LLM(args.model, device="cpu", progress=False)
    exact = pymllm.LLM(args.model, device="cpu", dtype="float32", compute="exact", progress=False)
    ids = llm.tokenizer.encode(text, add_special_tokens=False)[: args.tokens]
    texts = {"pymllm, exact": perplexity(exact, ids), "pymllm, auto": perplexity(llm, ids)}
    found: dict[str, Any] = {
        "model": args.model.name,
        "bytes": args.model.stat().st_size,
        "machine": machine(),
        "tokens": None,
        "text_tokens": len(ids),
        "compared_tokens": min(COMPARED_TOKENS, len(ids) - 1),
        "perplexity": texts,
    }
    print(json.dumps(texts), flush=True)
    if args.llama_python:
        with llama_cpp(args.llama_python, args.model) as theirs:
            found["machine"]["xllamacpp"] = theirs.version
            found["tokens"] = compare_tokens(llm, theirs)
            print(
                f"{len(found['tokens']['differ'])} of {found['tokens']['strings']} strings differ", flush=True
            )
            texts["llama.cpp"] = perplexity_of_llama_cpp(theirs, ids)
            print(f"perplexity of llama.cpp: {texts['llama.cpp']:.4f}", flush=True)
    del llm, exact
    found["methods"] = compare_methods(args.model, args.methods, ids[: COMPARED_TOKENS + 1])
    lines = write_page(found)
    print("\n".join(lines))
    for row in (found["tokens"] or {"differ": []})["differ"][:20]:
        print(row, file=sys.stderr)
    if args.write:
        results = Path(__file__).parent / "results"
        intro = (__doc__ or "").split("\n\n")[0]
        page = "\n".join(
            [f"# Beside llama.cpp\n\n{intro}\n\n`python benchmarks/beside_llama_cpp.py`\n", *lines, ""]
        )
        (results / "beside_llama_cpp.md").write_text(page)
        (results / "beside_llama_cpp.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
