"""The stage `end_to_end`: small models on the GPU beside the CPU: logits, answers, graphs, waits for the device."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pymllm import LLM, SamplingParams
from pymllm.weights.shipped import shipped_model

from . import models
from .notes import LeftOut, Notes, WrongResult

LONG = [(7 * i + 3) % 4000 for i in range(300)]
PROMPTS = [[5, 6, 7], [9] * 30, LONG[:150]]  # three, in a graph of four rows
MANY = [LONG[i : i + 5 + i] for i in range(17)]  # 17, in a graph of 24 rows
NEW = 24
ALIKE = 8  # tokens: later ones may differ, as graphs have more rows, and sums other orders
LOGITS, ROUNDED = 3e-2, 8e-2  # relative; ROUNDED where inputs are rounded to 8 bits
REHEARSED = ("awq int4", "experts in awq", "gated delta rule", "decoded in blocks", "an adapter")


@dataclass(frozen=True)
class Model:
    """A model to run on both.

    made: a config to write a random model of; None: the shipped model.  options: of both LLMs.  compute: the CPU's.
    """

    name: str
    made: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    compute: str = "exact"
    tolerance: float = LOGITS
    adapter: bool = False


def all_models() -> list[Model]:
    """List the models, the most important first."""

    def layers(method: str) -> dict[str, Any]:
        return {"quant": {"**.layers.**": method}}

    eight_bit: dict[str, Any] = {"compute": "checkpoint", "tolerance": ROUNDED}
    return [
        Model("awq int4"),
        Model("awq int4 in float16", options={"dtype": "float16"}),
        Model("experts in awq", models.mixture(), tolerance=6e-2),
        Model("fp8", options=layers("fp8"), **eight_bit),
        Model("fp8 keys and values", options={"kv_cache": "fp8:scale=token"}),
        Model("fp8 in blocks", options=layers("fp8:granularity=block"), **eight_bit),
        Model("bfloat16", options=layers("none")),
        Model("gated delta rule", models.hybrid(), tolerance=6e-2),
        Model("int8", options=layers("int8:activations=token"), **eight_bit),
        Model("mxfp4", options={"quant": {"**.mlp.**": "mxfp4"}}),
        Model("decoded in blocks", models.in_blocks(), tolerance=6e-2),
        Model("an adapter", adapter=True),
        Model("fp8 with one scale", options=layers("fp8:granularity=tensor,activations=tensor"), **eight_bit),
        Model("nvfp4", options={"quant": {"**.mlp.**": "nvfp4"}}),
        Model(
            "one expert of another method",
            models.mixture(),
            {"quant": {"**.experts.0.**": "none"}},
            tolerance=6e-2,
        ),
    ]


def run(notes: Notes) -> None:
    task = notes.task
    chosen = [model for model in all_models() if not task.rehearse or model.name in REHEARSED]
    mine = chosen[task.part :: task.parts]
    notes.plan(len(mine) + (task.part == 0))
    for model in mine:
        notes.run(model.name, partial(compare, model, task.rehearse, Path(task.work)))
        gc.collect()
    if task.part == 0:
        notes.run("every other GPU", lambda: other_gpus(task.rehearse))


def compare(model: Model, rehearse: bool, work: Path) -> dict[str, Any]:
    """Run a model on the GPU (in a rehearsal on the CPU) and on the CPU.  Raises WrongResult where they differ."""
    path = shipped_model()
    if model.made is not None:
        path = models.write_model(work / model.name.replace(" ", "_"), model.made, torch.device("cpu"))
    options: dict[str, Any] = {"dtype": "bfloat16", "progress": False, "prefix_reuse": False, **model.options}
    cpu = LLM(path, device="cpu", compute=model.compute, **options)
    gpu = LLM(path, device="cpu" if rehearse else "cuda", **options)
    asked: dict[str, Any] = {}
    if model.adapter:
        folder = models.write_adapter(work / "adapter", cpu)
        for llm in (cpu, gpu):
            llm.load_adapter("first", folder)
        asked = {"adapter": "first"}
    found: dict[str, Any] = {}
    vocabulary, lengths = cpu.config.size("vocab_size"), (3, 20) if rehearse else (3, 20, 200)
    for count in lengths:
        ids = [token % vocabulary for token in LONG[:count]]
        both = [llm.logits(ids, **asked).double().cpu() for llm in (gpu, cpu)]
        found[f"logits_{count}"] = round(float((both[0] - both[1]).norm() / both[1].norm()), 4)
    found |= _answers(gpu, vocabulary, asked, rehearse)
    worst = max(found[f"logits_{count}"] for count in lengths)
    found["say"] = f"{model.name}: logits off by {worst}, {_told(found)}"
    if not worst <= model.tolerance:
        raise WrongResult(f"the logits are off by {worst}, more than {model.tolerance}", found)
    eager_by_design = rehearse and model.adapter  # the tapes of a CPU have no adapters, a GPU's graphs do
    if _planned(gpu) and not found["graphs"] and not eager_by_design:
        raise WrongResult(f"was to be captured, and runs eagerly: {found['eager_reason']}", found)
    if not found["repeatable"]:
        raise WrongResult("the same prompts were answered differently a second time", found)
    if found["alike"] < 0.75 * found["requests"]:
        raise WrongResult(
            f"graphs and eager steps agree for {found['alike']} of {found['requests']} answers", found
        )
    return found


def _planned(llm: LLM) -> bool:
    """Tell whether the plan says that decoding steps are captured."""
    return bool((llm.plan.decoding_graph or {}).get("captured"))


def _told(found: dict[str, Any]) -> str:
    if not found["graphs"]:
        return f"no graphs ({found['eager_reason'] or 'no step was captured'})"
    waits = f", {found['waits']} waits for {ALIKE} tokens" if "waits" in found else ""
    return f"graphs, {found['alike']} of {found['requests']} answers as without{waits}"


def _answers(gpu: LLM, vocabulary: int, asked: dict[str, Any], rehearse: bool) -> dict[str, Any]:
    """Answer prompts twice with graphs, and once without."""
    params = SamplingParams(max_tokens=ALIKE if rehearse else NEW, ignore_eos=True)
    runner = gpu.engine.runner

    def answers(prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        ids = [[token % vocabulary for token in prompt] for prompt in prompts]
        return [output.token_ids for output in gpu.generate(ids, params, **asked)]

    batches = [PROMPTS] if rehearse else [PROMPTS, MANY]
    first = [answers(batch) for batch in batches]
    again = [answers(batch) for batch in batches]
    reason, captured = runner.why_eager, any(batch.replay for batch in runner._decoding.values())
    before, runner.eager_reason = runner.eager_reason, runner.eager_reason or "asked to"
    eager = [answers(batch) for batch in batches]
    runner.eager_reason = before
    pairs = [pair for one, two in zip(first, eager, strict=True) for pair in zip(one, two, strict=True)]
    found = {
        "repeatable": first == again,
        "graphs": reason is None and captured,
        "eager_reason": reason,
        "requests": len(pairs),
        "alike": sum(one[:ALIKE] == two[:ALIKE] for one, two in pairs),
    }
    sampled = SamplingParams(max_tokens=4, temperature=0.8, top_p=0.9, seed=1, ignore_eos=True)
    [output] = gpu.generate([[5, 6, 7]], sampled, **asked)
    if len(output.token_ids) != 4:
        raise WrongResult(f"a sampled answer has {len(output.token_ids)} tokens, not 4", found)
    return found if rehearse else found | {"waits": _count_waits(gpu, asked)}


def _count_waits(gpu: LLM, asked: dict[str, Any]) -> int:
    """Count how often the host waits for the device while it answers ALIKE tokens."""
    torch.cuda.set_sync_debug_mode(1)
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            gpu.generate([[5, 6, 7]], SamplingParams(max_tokens=ALIKE, ignore_eos=True), **asked)
    finally:
        torch.cuda.set_sync_debug_mode(0)
    return sum("synchroniz" in str(warning.message) for warning in seen)


def other_gpus(rehearse: bool) -> dict[str, Any]:
    """Answer on each further GPU as on the first one."""
    count = 0 if rehearse else torch.cuda.device_count()
    if count < 2:
        raise LeftOut("there is one GPU" if count else "a rehearsal has none")
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)

    def answers(device: str) -> list[tuple[int, ...]]:
        llm = LLM(device=device, dtype="bfloat16", progress=False)
        return [output.token_ids for output in llm.generate(PROMPTS, params)]

    expected = answers("cuda:0")
    for number in range(1, count):
        if answers(f"cuda:{number}") != expected:
            raise WrongResult(f"cuda:{number} answers otherwise than cuda:0")
    return {"say": f"{count} GPUs answer alike"}
