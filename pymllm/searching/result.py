"""The result of a search: rules, what they cost, and the curve of bytes against KL with uniform choices beside it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pymllm.checking.figures import require_matplotlib, save_figure
from pymllm.disk import write_whole

SCHEMA_VERSION = 1
WIDTH, HEIGHT = 64, 16  # of the drawn curve, in characters


@dataclass(frozen=True)
class ChosenWeight:
    """One weight and its method.

    names: the layers that it is for.  method: as in a rule, or "stored".  bits: a weight, as stored.
    harm: estimated, in nats a token.
    """

    names: list[str]
    method: str
    weights: int
    bits: float
    harm: float


@dataclass(frozen=True)
class CurvePoint:
    """One choice for the whole model.

    name: a method for all weights, or a budget of bits that a search kept.  uniform: whether it is the former.
    bits: a weight.  bytes: of all weights, as stored.  kl: measured on held-out text, in nats a token.
    """

    name: str
    uniform: bool
    bits: float
    bytes: int
    kl: float


@dataclass(frozen=True)
class SearchResult:
    """The rules that a search found.  str() says what they cost; `rules_file` is what --quant-file reads.

    rules: lines "PATTERN=METHOD", no two of them for one layer.  rules_file: the same with comments.
    bits: a weight, at most the budget: codes, scales and zero points of all searched weights, as a checkpoint stores
    them.  budget: what was asked for.  weights: how many elements were searched.
    bytes: of them as stored.  packed_bytes: of all weights as the kernels of this machine hold them.
    kept_bytes: of what was not searched (norms, biases, routers), as stored.
    estimate: the sum of the chosen weights' harms.  bound: no choice within the budget has a smaller sum.
    kl: measured on held-out text, against the stored weights in float32, in nats a token; fitted_kl: on the text that
    harms were estimated on.
    fitted_tokens, held_out_tokens: how many tokens each has.  text: what it was read from.
    chosen: each weight's method.  curve: what else could be had, by bytes.  kernels: how many layers each kernel runs.
    writes: the formats in which `pymllm quantize` can write these rules.  notes: what a user should know besides.
    """

    model: str
    budget: float
    bits: float
    weights: int
    bytes: int
    packed_bytes: int
    kept_bytes: int
    estimate: float
    bound: float
    kl: float
    fitted_kl: float
    fitted_tokens: int
    held_out_tokens: int
    text: str
    rules: list[str]
    rules_file: str
    chosen: list[ChosenWeight]
    curve: list[CurvePoint]
    kernels: dict[str, int]
    writes: list[str]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    def best_uniform(self) -> CurvePoint | None:
        """Return the uniform choice of least KL within the budget; None: none is within it."""
        within = [point for point in self.curve if point.uniform and point.bits <= self.budget]
        return min(within, key=lambda point: (point.kl, point.bytes), default=None)

    def table(self) -> str:
        """Write one line for each point of the curve, by bytes."""
        lines = [f"{'weights':>10} {'bits':>7} {'KL':>10}  choice"]
        for point in self.curve:
            what = f"every weight {point.name}" if point.uniform else f"searched, {point.name}"
            lines.append(f"{point.bytes / 1e6:8.1f}MB {point.bits:7.3f} {point.kl:10.3e}  {what}")
        return "\n".join(lines)

    def drawing(self) -> str:
        """Draw the curve in characters: bytes to the right, KL upwards on a logarithmic axis."""
        points = [point for point in self.curve if point.kl > 0]
        if not points:
            return ""
        right = _axis([point.bytes for point in points], WIDTH)
        up = _axis([math.log10(point.kl) for point in points], HEIGHT)
        rows = [[" "] * WIDTH for _ in range(HEIGHT)]
        for point in sorted(points, key=lambda point: not point.uniform):
            row = HEIGHT - 1 - up(math.log10(point.kl))
            rows[row][right(point.bytes)] = "o" if point.uniform else "*"
        most, least = (f"{pick(point.kl for point in points):.1e}" for pick in (max, min))
        labels = [most, *[""] * (HEIGHT - 2), least]
        lines = [f"{label:>9} |{''.join(row)}" for label, row in zip(labels, rows, strict=True)]
        first, last = (f"{pick(point.bytes for point in points) / 1e6:.1f} MB" for pick in (min, max))
        below = f"{'':>10} {first}{last:>{WIDTH - len(first)}}"
        legend = "KL in nats a token over bytes; * searched, o every weight in one method"
        return "\n".join([*lines, f"{'':>9} +{'-' * WIDTH}", below, f"{'':>10} {legend}"])

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.bits:.4f} bits a weight of {self.budget:g}, {self.bytes / 1e6:.1f} MB stored "
            f"(and {self.kept_bytes / 1e6:.2f} MB of norms, biases and routers)",
            f"  packed for this machine: {self.packed_bytes / 1e6:.1f} MB; "
            + ", ".join(f"{count} x {kernel}" for kernel, count in self.kernels.items()),
            f"  KL {self.kl:.3e} nats a token on {self.held_out_tokens} held-out tokens, {self.fitted_kl:.3e} on "
            f"{self.fitted_tokens} others; estimated {self.estimate:.3e}, and no choice below {self.bound:.3e}",
        ]
        uniform = self.best_uniform()
        if uniform is not None:
            lines.append(
                f"  the best single method within the budget, {uniform.name}: KL {uniform.kl:.3e} in "
                f"{uniform.bits:.3f} bits a weight"
            )
        lines += [f"  note: {note}" for note in self.notes]
        drawn = ["", self.table(), "", self.drawing()] if self.curve else []
        return "\n".join([*lines, *drawn])

    def save_plot(self, file: str | Path) -> None:
        """Plot KL against bytes as SVG (or what the file's ending says).

        MissingExtraError without the extra `plot`; ConfigError for a file that cannot be written.
        """
        figure = require_matplotlib()(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for uniform, label, look in ((True, "every weight in one method", "o"), (False, "searched", "*-")):
            points = [point for point in self.curve if point.uniform is uniform]
            axes.plot([p.bytes / 1e6 for p in points], [p.kl for p in points], look, label=label)
            for point in points if uniform else ():
                axes.annotate(point.name, (point.bytes / 1e6, point.kl), fontsize=6)
        axes.set_yscale("log")
        axes.set_xlabel("stored weights, MB")
        axes.set_ylabel("KL from the stored weights on held-out text, nats a token")
        axes.set_title(self.model)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        save_figure(figure, file)


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all.  ConfigError if it cannot be written."""
    raw = text.encode()
    write_whole(file, [raw], len(raw))


def _axis(values: list[float] | list[int], size: int) -> Any:
    """Make a function from a value to one of `size` places."""
    low, high = min(values), max(values)
    span = (high - low) or 1
    return lambda value: round((value - low) / span * (size - 1))
