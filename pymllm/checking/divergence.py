"""How far a model's answers are from those of its weights in float32: next-token distributions over a text.

Two references, both run by the reference kernels, which decode weights and multiply in float32: the very weights that
run (what kernels and activation dtypes change), and, where rules convert, the weights that are stored (what the rules
change besides). Logits of the model under test wait in a temporary file, so that one model is in memory at a time.
"""

# T tokens, V vocabulary

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pymllm.engine.runner import Runner
from pymllm.loading.load import load_prepared
from pymllm.loading.prepare import Prepared, prepare
from pymllm.models.causal_lm import CausalLM
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.text.windows import Windows, random_windows, read_windows

REFERENCE = {"linear": "reference", "embedding": "reference", "experts": "reference"}


@dataclass(frozen=True)
class Divergence:
    """Of one model's next-token distributions from a reference's, over all positions.

    kl: mean of KL(reference || model) in nats; worst_kl: its largest.  top1: how often both have the same first token.
    """

    kl: float
    worst_kl: float
    top1: float


@dataclass(frozen=True)
class EndToEnd:
    """kernels: from the same weights in float32.  rules: from the stored weights in float32; None: no rule converts.

    perplexity: on the text, of the model ("model"), of its weights in float32 ("float32") and of the stored ones
    ("stored"); empty without text.  text: its file, or None for random tokens.
    """

    tokens: int
    windows: int
    text: str | None
    kernels: Divergence
    rules: Divergence | None = None
    perplexity: dict[str, float] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For people."""
        where = self.text or "random ids"
        found = [f"end to end on {self.tokens} tokens of {where}:"]
        for name, one in (("the same weights in float32", self.kernels), ("the stored weights", self.rules)):
            if one is not None:
                found.append(
                    f"  against {name}: KL {one.kl:.2e} nats a token (at most {one.worst_kl:.2e}), "
                    f"first token the same at {one.top1:.2%}"
                )
        if self.perplexity:
            values = ", ".join(f"{name} {value:.3f}" for name, value in self.perplexity.items())
            found.append(f"  perplexity: {values}")
        return found


def measure_end_to_end(
    prepared: Prepared,
    model: CausalLM,
    arguments: Mapping[str, Any],
    *,
    text: str | Path | None = None,
    tokens: int = 2048,
    window: int = 512,
) -> EndToEnd:
    """Run a loaded model, then its references, over a text file (None: random token ids).

    arguments: those of `prepare` that made it, but for dtype, compute and kernels.
    """
    windows = (
        random_windows(prepared.config, tokens, window)
        if text is None
        else read_windows(prepared.checkpoint, prepared.config, Path(text), tokens, window)
    )
    converts = any(isinstance(d.method, ConvertedLinearMethod) for d in prepared.quant.decisions.values())
    count, vocabulary = sum(map(len, windows)), prepared.config.size("vocab_size")
    exact = {**arguments, "dtype": "float32", "compute": "exact", "kernels": REFERENCE}
    with tempfile.TemporaryFile() as file:
        kept = np.memmap(file, np.float32, "w+", shape=(count, vocabulary))
        losses = {"model": _keep(model, prepared, windows, kept)}
        kernels, losses["float32"] = _compare(_loaded(exact), windows, kept)
        rules = None
        if converts:
            rules, losses["stored"] = _compare(_loaded({**exact, "quant": None}), windows, kept)
        del kept
    perplexity = {name: _exp(loss) for name, loss in losses.items()} if text is not None else {}
    name = None if text is None else str(text)
    return EndToEnd(count, len(windows), name, kernels, rules, perplexity)


def _loaded(arguments: Mapping[str, Any]) -> tuple[CausalLM, Prepared]:
    prepared = prepare(**arguments)
    return load_prepared(prepared, progress=False), prepared


def _runner(model: CausalLM, prepared: Prepared) -> Runner:
    return Runner(model, torch.device(prepared.execution.device))


def _keep(model: CausalLM, prepared: Prepared, windows: Windows, kept: Any) -> float:
    """Write the model's logits to `kept` [T, V].  Returns its mean loss in nats."""
    runner, at, loss = _runner(model, prepared), 0, 0.0
    for ids in windows:
        logits = runner.logits(list(ids)).float().cpu()
        kept[at : at + len(ids)] = logits.numpy()
        at += len(ids)
        loss += _loss(logits, ids)
    return loss / max(sum(len(ids) - 1 for ids in windows), 1)


def _compare(reference: tuple[CausalLM, Prepared], windows: Windows, kept: Any) -> tuple[Divergence, float]:
    """The divergence of the kept logits from a reference's, and the reference's mean loss."""
    runner, at, loss = _runner(*reference), 0, 0.0
    divergences, same = [], 0
    for ids in windows:
        logits = runner.logits(list(ids)).float().cpu()
        found = torch.from_numpy(np.array(kept[at : at + len(ids)]))
        at += len(ids)
        loss += _loss(logits, ids)
        expected = logits.log_softmax(-1)
        divergences.append((expected.exp() * (expected - found.log_softmax(-1))).sum(-1))
        same += int((logits.argmax(-1) == found.argmax(-1)).sum())
    kl = torch.cat(divergences)
    mean_loss = loss / max(sum(len(ids) - 1 for ids in windows), 1)
    # Rounding alone makes it negative; a NaN stays one.
    return Divergence(float(kl.mean().clamp(min=0)), float(kl.max().clamp(min=0)), same / at), mean_loss


def _loss(logits: Tensor, ids: tuple[int, ...]) -> float:
    """Summed over the window's predictions, in nats."""
    targets = torch.tensor(ids[1:])
    return float(torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum"))


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
