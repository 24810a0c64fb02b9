"""The distance of a model's answers from those of its weights in float32: next-token distributions over a text.

Two references, both run by the reference kernels, which decode weights and multiply in float32: the very weights that
run (what kernels and activation dtypes change), and, where rules convert, the weights that are stored (what the rules
change besides). Both are what this library reads of the files: what it reads wrongly, it reads wrongly both times, and
only another reader can tell. Logits of the model under test wait in a temporary file, so that one model is in memory at
a time.
"""

# T tokens, V vocabulary

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pymllm.engine.runner import Runner
from pymllm.errors import counted
from pymllm.loading.load import load_prepared
from pymllm.loading.prepare import Prepared, prepare
from pymllm.models.language_model import LanguageModel
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.text.windows import Windows, random_windows, read_windows

REFERENCE = {"linear": "reference", "embedding": "reference", "experts": "reference"}


@dataclass(frozen=True)
class Divergence:
    """The distance of one model's next-token distributions from a reference's, over all positions.

    kl: mean of KL(reference || model) in nats; worst_kl: its largest.
    top1: the share of positions where both have the same first token.
    """

    kl: float
    worst_kl: float
    top1: float


@dataclass(frozen=True)
class EndToEnd:
    """The divergences of a whole model.

    tokens, windows: how many were run.  text: its file, or None for random tokens.
    kernels: from the same weights in float32.  rules: from the stored weights in float32; None: no rule converts.
    perplexity: on the text, of the model ("model"), of its weights in float32 ("float32") and of the stored ones
    ("stored"); empty without text.
    """

    tokens: int
    windows: int
    text: str | None
    kernels: Divergence
    rules: Divergence | None = None
    perplexity: dict[str, float] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Write a few lines for people."""
        where = self.text or "random ids"
        found = [f"end to end on {counted(self.tokens, 'token')} of {where}:"]
        references = (("the same weights in float32", self.kernels), ("the stored weights", self.rules))
        for name, one in references:
            if one is not None:
                found.append(
                    f"  against {name}: KL {one.kl:.2e} nats a token (at most {one.worst_kl:.2e}), "
                    f"first token the same at {one.top1:.2%}"
                )
        found.append("  (both sides are this library's reading of the files)")
        if self.perplexity:
            values = ", ".join(f"{name} {value:.3f}" for name, value in self.perplexity.items())
            found.append(f"  perplexity: {values}")
        return found


def measure_end_to_end(
    prepared: Prepared,
    model: LanguageModel,
    arguments: Mapping[str, Any],
    *,
    text: str | Path | None = None,
    tokens: int = 2048,
    window: int = 512,
) -> EndToEnd:
    """Run a loaded model, then its references, over a text file (None: random token ids).

    prepared, model: what `prepare` and `load_prepared` made.  arguments: those of `prepare` to make it again, but for
    dtype, compute and kernels.  tokens: how many ids.  window: how many of these are run together.
    """
    model.check_generates()
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


def _loaded(arguments: Mapping[str, Any]) -> tuple[LanguageModel, Prepared]:
    prepared = prepare(**arguments)
    return load_prepared(prepared, progress=False), prepared


def _run(
    model: LanguageModel, prepared: Prepared, windows: Windows
) -> Iterator[tuple[slice, tuple[int, ...], Tensor]]:
    """Run a model over each window.  Yields the window's place among all tokens, its ids and its logits [T, V]."""
    runner, start = Runner(model, torch.device(prepared.execution.device)), 0
    for ids in windows:
        yield slice(start, start + len(ids)), ids, runner.logits(list(ids)).float().cpu()
        start += len(ids)


def _keep(model: LanguageModel, prepared: Prepared, windows: Windows, kept: Any) -> float:
    """Write the model's logits to `kept` [T, V].  Returns its mean loss in nats."""
    loss = 0.0
    for place, ids, logits in _run(model, prepared, windows):
        kept[place] = logits.numpy()
        loss += _loss(logits, ids)
    return loss / _predictions(windows)


def _compare(
    reference: tuple[LanguageModel, Prepared], windows: Windows, kept: Any
) -> tuple[Divergence, float]:
    """Measure the divergence of kept logits [T, V] from a reference's.  Returns it and the reference's mean loss."""
    loss, same = 0.0, 0
    divergences = []
    for place, ids, logits in _run(*reference, windows):
        found = torch.from_numpy(np.array(kept[place]))
        loss += _loss(logits, ids)
        expected = logits.log_softmax(-1)
        divergences.append((expected.exp() * (expected - found.log_softmax(-1))).sum(-1))
        same += int((logits.argmax(-1) == found.argmax(-1)).sum())
    kl = torch.cat(divergences)
    # Rounding alone makes it negative; a NaN stays one.
    mean, worst = float(kl.mean().clamp(min=0)), float(kl.max().clamp(min=0))
    return Divergence(mean, worst, same / kl.numel()), loss / _predictions(windows)


def _predictions(windows: Windows) -> int:
    """Count the tokens that are predicted: all but the first of each window."""
    return max(sum(len(ids) - 1 for ids in windows), 1)


def _loss(logits: Tensor, ids: tuple[int, ...]) -> float:
    """Sum the loss of the window's predictions, in nats.  logits: [T, V], for the T ids."""
    targets = torch.tensor(ids[1:])
    return float(torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum"))


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
