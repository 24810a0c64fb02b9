"""The stage `eight_b`: an int4 model of the shapes of 8 B weights: loading, memory, tokens a second."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

from pymllm import LLM, SamplingParams

from . import models
from .notes import LeftOut, Notes, WrongResult
from .place import Place

BATCHES = (1, 16, 64)
PROMPT, NEW, WARM = 32, 128, 4  # tokens
LONG_PROMPT = 4000
BYTES = 7 << 30  # of the file, with room to spare


class Engine:
    """The model, once it is loaded, and what is measured of it."""

    def __init__(self, place: Place, work: Path) -> None:
        self.place, self.folder = place, work / "eight_b"
        self.config = models.awq(models.SIZES if place.rehearse else models.EIGHT_B)
        self.new, self.long_prompt = (4, 40) if place.rehearse else (NEW, LONG_PROMPT)
        self.llm: LLM | None = None

    def load(self) -> dict[str, Any]:
        """Write the model, and load it."""
        free = shutil.disk_usage(self.folder.parent).free
        if free < BYTES and not self.place.rehearse:
            raise LeftOut(
                f"{free >> 30} GiB are free in {self.folder.parent}, of {BYTES >> 30}: give another --work"
            )
        started = time.perf_counter()
        models.write_model(self.folder, self.config, self.place.torch_device)
        if not self.place.rehearse:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        wrote, started = time.perf_counter() - started, time.perf_counter()
        where = "cpu" if self.place.rehearse else "cuda"
        self.llm = LLM(self.folder, device=where, dtype="bfloat16", progress=False, prefix_reuse=False)
        loaded = time.perf_counter() - started
        shutil.rmtree(self.folder, ignore_errors=True)
        found: dict[str, Any] = {"write_s": round(wrote, 1), "load_s": round(loaded, 1)}
        if not self.place.rehearse:
            found |= {
                "gib": round(torch.cuda.memory_allocated() / 2**30, 2),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            }
        memory = f", {found['gib']} GiB with its cache, {found['peak_gib']} at most" if "gib" in found else ""
        return found | {"say": f"loaded in {found['load_s']} s{memory} (written in {found['write_s']} s)"}

    def decode(self, batch: int, graphs: bool, temperature: float = 0.0) -> dict[str, Any]:
        """Measure decoding: tokens a second of all requests together, after a first run."""
        assert self.llm is not None
        runner = self.llm.engine.runner
        if not graphs:
            before, runner.eager_reason = runner.eager_reason, runner.eager_reason or "asked to"
        try:
            speed = self._speed(batch, temperature)
        finally:
            reason = runner.eager_reason
            if not graphs:
                runner.eager_reason = before
        how = "eager" if not graphs else "graphs" if reason is None else f"eager ({reason})"
        how += f", sampled at {temperature}" if temperature else ""
        return {
            "tokens_per_second": speed,
            "say": f"{batch} requests, {how}: {speed} tokens/s, {speed / batch:.1f} each",
        }

    def _speed(self, batch: int, temperature: float) -> float:
        assert self.llm is not None
        top = self.config["vocab_size"]
        prompts = [[(31 * i + row) % top for i in range(PROMPT)] for row in range(batch)]
        settings: dict[str, Any] = {"temperature": temperature, "ignore_eos": True}
        if temperature:
            settings |= {"top_p": 0.95, "seed": 1}
        self.llm.generate(prompts, SamplingParams(max_tokens=WARM, **settings))
        outputs = self.llm.generate(prompts, SamplingParams(max_tokens=self.new, **settings))
        if any(len(output.token_ids) != self.new for output in outputs):
            raise WrongResult(f"answers of {[len(o.token_ids) for o in outputs]} tokens, not {self.new}")
        return round(sum(output.decode_tokens_per_second for output in outputs), 1)

    def read(self) -> dict[str, Any]:
        """Measure reading a long prompt, the second time."""
        assert self.llm is not None
        top, params = self.config["vocab_size"], SamplingParams(max_tokens=1, ignore_eos=True)
        prompt = [[(17 * i) % top for i in range(self.long_prompt)]]
        times = []
        for _ in range(2):
            started = time.perf_counter()
            self.llm.generate(prompt, params)
            times.append(time.perf_counter() - started)
        speed = round(self.long_prompt / times[1])
        return {
            "tokens_per_second": speed,
            "first_s": round(times[0], 2),
            "say": f"a prompt of {self.long_prompt}: {speed} tokens/s (the first one took {times[0]:.2f} s)",
        }


def run(notes: Notes) -> None:
    engine = Engine(Place(notes.task.rehearse), Path(notes.task.work))
    layers = engine.config["num_hidden_layers"]
    if not notes.run(f"loading {layers} layers", engine.load) and engine.llm is None:
        if not notes.begun:
            return
        engine.load()  # a process before this one has died, with the model
    if engine.llm is None:
        return
    for batch in BATCHES[:1] if engine.place.rehearse else BATCHES:
        for graphs in (True, False):
            name = f"{batch} requests, {'graphs' if graphs else 'eager'}"
            notes.run(name, lambda batch=batch, graphs=graphs: engine.decode(batch, graphs))  # type: ignore[misc]
    notes.run("a long prompt", engine.read)
    notes.run(
        "16 requests, sampled", lambda: engine.decode(16 if not engine.place.rehearse else 1, True, 0.8)
    )
