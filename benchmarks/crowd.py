"""Show what the engine promises, at length: crowds, misfortunes and schemas (the tests run a little of each).

    python benchmarks/crowd.py answers [MODEL ...] [--requests 64] [--strategy S ...] [--kv-cache K ...] [--all-ways]
    python benchmarks/crowd.py misfortunes [MODEL] [--requests 10000] [--strategy S]
    python benchmarks/crowd.py schemas [MODEL] [--requests 200] [--strategy S]

MODEL: a checkpoint, "shipped", or a model type of which a tiny random one is made ("gemma2", say).  --seed: another
crowd.

answers: requests at random times, of all lengths, each token for token what the request answers alone, and what one
forward without a cache says, in every way: steps of 1 to 1024 tokens, pages shared or not, enough or too few. Where a
KV cache rounds, steps run a token at a time, and once more as they are: then a token may turn that hardly leads.
misfortunes: requests are aborted, streams cancelled, and parts of the engine fail; others never notice, and pages,
states, lists and memory come back.
schemas: answers to random JSON schemas are valid by the package jsonschema.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from pymllm import LLM
from tests.adapters.handwritten import adapter_for_shipped
from tests.checkpoints import write_checkpoint
from tests.engine.crowd import (
    ALL_WAYS,
    WAYS,
    Answer,
    Way,
    check_against_whole_forwards,
    compare,
    make_crowd,
    one_by_one,
    play,
    rounds,
)
from tests.engine.misfortunes import misfortunes, resident
from tests.generic import zoo
from tests.text.check_schemas import answer_schemas

KV_CACHES = ("none", "float32", "bfloat16", "int8", "fp8", "fp8:scale=token")
TYPES = ("shipped", "gemma2", "qwen3_moe", "stablelm", "qwen3_5_text")
# How much memory may grow after the first fifth of the requests: what the allocator keeps of the largest steps.
MEMORY = 16 << 20


def load(name: str, folder: Path, **settings: str | None) -> LLM:
    path: str | Path | None = name
    if name == "shipped":
        path = None
    elif not Path(name).exists():
        path = folder
        if name == "qwen3_5_text":
            write_checkpoint(folder, name, max_position_embeddings=256)
        else:
            zoo.small(name).model().save_pretrained(folder)
    return LLM(path, device="cpu", dtype="float32", compute="exact", progress=False, **settings)  # type: ignore[arg-type]


def answers(args: argparse.Namespace) -> None:
    print("| model | strategy | KV cache | way | preempted | shared tokens | answers that differ |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in args.model or TYPES:
        for strategy in args.strategy or [None]:
            for kv_cache in args.kv_cache or KV_CACHES:
                with tempfile.TemporaryDirectory() as folder:
                    llm = load(name, Path(folder), strategy=strategy, kv_cache=kv_cache)
                    play_all(llm, f"| {name} | {strategy or 'its own'} | {kv_cache} |", args)


def play_all(llm: LLM, row: str, args: argparse.Namespace) -> None:
    made = make_crowd(llm, args.requests, args.seed)
    crowd, expected = [asked for asked, _ in made], [answer for _, answer in made]
    exact = not rounds(llm)
    ways: list[tuple[Way, bool]] = [(way, False) for way in (ALL_WAYS if args.all_ways else WAYS)]
    slowly = expected
    if exact and llm.engine.strategy.block_length == 1:
        print(f"{row} against whole forwards | | | 0 of {check_against_whole_forwards(llm, made)} |")
    if not exact:
        alone = play(llm, crowd, Way(reuse=False), step=one_by_one(llm))
        slowly = [Answer(tuple(r.answer), "", r.finish_reason or "") for r in alone]
        ways += [(way, True) for way in WAYS[2:5]]
    for seed, (way, slow) in enumerate(ways):
        requests = play(llm, crowd, way, seed, one_by_one(llm) if slow else None)
        differ = compare(requests, slowly if slow else expected, exact or slow)
        preempted, shared = (
            sum(getattr(request, name) for request in requests) for name in ("preemptions", "cached_tokens")
        )
        print(
            f"{row} {way}{', token by token' if slow else ''} | {preempted} | {shared} | {len(differ)} |",
            flush=True,
        )


def suffer(args: argparse.Namespace) -> None:
    (name,) = args.model or ["shipped"]
    with tempfile.TemporaryDirectory() as folder:
        llm = load(name, Path(folder), strategy=(args.strategy or [None])[0])
        adapters: tuple[str | None, ...] = (None,)
        if name == "shipped":
            adapter = Path(folder) / "odd"
            adapter.mkdir()
            adapter_for_shipped(adapter, llm)
            llm.load_adapter("odd", adapter)
            adapters = (None, "odd")
        memory: list[tuple[int, int]] = []

        def told(done: int) -> None:
            memory.append((done, resident()))
            if len(memory) % 5 == 1:
                print(f"{done} requests: {memory[-1][1] / 1e6:.1f} MB", flush=True)

        book, faults = misfortunes(llm, args.requests, args.seed, adapters, told=told)
    print(f"became: {dict(book.fates)}")
    print(f"faults: {dict(faults.came)}")
    warm = next(used for done, used in memory if done >= args.requests / 5)
    growth = max(used for _, used in memory) - warm
    print(f"memory grew by {growth / 1e6:.1f} MB after the first fifth; at most {MEMORY / 1e6:.1f} may be")
    assert growth <= MEMORY


def schemas(args: argparse.Namespace) -> None:
    (name,) = args.model or ["shipped"]
    with tempfile.TemporaryDirectory() as folder:
        llm = load(name, Path(folder), strategy=(args.strategy or [None])[0])
        found = answer_schemas(llm, args.requests, args.seed)
    kinds = Counter(kind for kind, _ in found)
    print(f"{len(found)} schemas: {dict(kinds)}; {sum(tokens for _, tokens in found)} tokens")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("answers", "misfortunes", "schemas"))
    parser.add_argument("model", nargs="*")
    parser.add_argument("--requests", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategy", action="append")
    parser.add_argument("--kv-cache", action="append")
    parser.add_argument("--all-ways", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.requests = args.requests or {"answers": 64, "misfortunes": 10_000, "schemas": 200}[args.what]
    {"answers": answers, "misfortunes": suffer, "schemas": schemas}[args.what](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
