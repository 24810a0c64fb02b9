"""`compare`: several sets of rules for one model, side by side: bytes, errors of weights, divergence of the answers.

pymllm.compare("org/model", ["", "**.layers.**=int8", "**.layers.**=int4"], text="held-out.txt")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymllm.arguments import checked
from pymllm.checking.divergence import EndToEnd
from pymllm.checking.figures import require_matplotlib, save_figure
from pymllm.checking.verify import Verification, verify
from pymllm.errors import ConfigError
from pymllm.loading.options import LoadOptions
from pymllm.planning.make_plan import plan
from pymllm.planning.plan import Plan
from pymllm.weights.shipped import shipped_model

if TYPE_CHECKING:
    from typing_extensions import Unpack

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ComparedLayer:
    """One layer (parts that run in one matmul together) under one set of rules.

    bytes: packed.  error: relative distance of its weights to the stored ones.
    """

    prefix: str
    kind: str
    method: str
    bytes: int
    error: float


@dataclass(frozen=True)
class Candidate:
    """One set of rules and what it does to the model.

    name: the rules as they were given; rules: one by one.  ok: whether its kernels verify.  weight_bytes: packed.
    """

    name: str
    rules: list[str]
    ok: bool
    weight_bytes: int
    layers: list[ComparedLayer]
    end_to_end: EndToEnd

    @property
    def kl(self) -> float:
        """The mean divergence from the stored weights in float32, in nats a token."""
        return (self.end_to_end.rules or self.end_to_end.kernels).kl


@dataclass(frozen=True)
class Comparison:
    """The sets of rules, in the order in which they were given."""

    model: str
    candidates: list[Candidate]

    @property
    def ok(self) -> bool:
        return all(candidate.ok for candidate in self.candidates)

    def to_dict(self) -> dict[str, Any]:
        best = self.best()
        candidates = [
            {**asdict(candidate), "best": index in best} for index, candidate in enumerate(self.candidates)
        ]
        return {
            "schema_version": SCHEMA_VERSION,
            "ok": self.ok,
            "model": self.model,
            "candidates": candidates,
        }

    def best(self) -> set[int]:
        """Find the candidates that no other beats: none has as few bytes and as low a divergence, and less of one."""
        points = [(one.weight_bytes, one.kl) for one in self.candidates]
        return {
            index
            for index, (size, kl) in enumerate(points)
            if math.isfinite(kl) and not any(_beats(other, (size, kl)) for other in points)
        }

    def rows(self, *, sort: bool = True) -> list[list[str]]:
        """Write a row of cells for each set of rules; `titles` names the cells.

        sort: whether the smallest model comes first; else they are in the order given.
        """
        best, rows = self.best(), []
        order = list(range(len(self.candidates)))
        if sort:
            order.sort(key=lambda index: self.candidates[index].weight_bytes)
        for index in order:
            candidate = self.candidates[index]
            whole = candidate.end_to_end
            cells = [
                "*" if index in best else "",
                f"{candidate.weight_bytes / 1e6:.1f} MB",
                f"{candidate.kl:.2e}",
                f"{(whole.rules or whole.kernels).top1:.2%}",
            ]
            if self.with_text:
                cells.append(f"{whole.perplexity.get('model', float('nan')):.3f}")
            failed = "" if candidate.ok else " (a kernel FAILS: pymllm verify)"
            rows.append([*cells, f"{letter(index)}: {candidate.name or 'as stored'}{failed}"])
        return rows

    @property
    def with_text(self) -> bool:
        """True if the answers were measured on a text, so that there are perplexities."""
        return any(candidate.end_to_end.perplexity for candidate in self.candidates)

    @property
    def titles(self) -> list[str]:
        """The titles of the cells of `rows`."""
        return ["", "weights", "KL", "top 1", *(["perplexity"] if self.with_text else []), "rules"]

    @property
    def legend(self) -> str:
        """The meaning of the cells of `rows`, in a line."""
        text = "; perplexity: on the text, lower is better" if self.with_text else ""
        return (
            "*: no other set has both fewer bytes and a lower KL; KL: how far the probabilities of next tokens are "
            "from those of the stored weights in float32, in nats a token (0: none); top 1: how often the likeliest "
            f"token is the same{text}."
        )

    def layer_titles(self) -> list[str]:
        """Return the titles of the cells of `layer_rows`."""
        each = [(f"error {letter(index)}", f"kB {letter(index)}") for index in range(len(self.candidates))]
        return [title for pair in each for title in pair] + ["layer"]

    def layer_rows(self, top: int | None = None) -> list[list[str]]:
        """Write the `top` layers of largest error (None: all): error and bytes under each set of rules."""
        names = list(dict.fromkeys(layer.prefix for c in self.candidates for layer in c.layers))
        by_name = [{layer.prefix: layer for layer in c.layers} for c in self.candidates]
        names.sort(key=lambda name: -max(c[name].error for c in by_name if name in c))
        rows = []
        for name in names[:top]:
            cells = [
                (f"{c[name].error:.2e}", f"{c[name].bytes / 1e3:.1f}") if name in c else ("", "")
                for c in by_name
            ]
            rows.append([*(cell for pair in cells for cell in pair), name])
        return rows

    def table(self) -> str:
        """Write one line for each set of rules: bytes, divergence, with text the perplexity."""
        return _aligned(self.titles, self.rows(sort=False))

    def layer_table(self, top: int | None = None) -> str:
        """List the `top` layers of largest error (None: all): error and bytes under each set of rules."""
        return _aligned(self.layer_titles(), self.layer_rows(top))

    def __str__(self) -> str:
        sets = f"{_aligned(self.titles, self.rows())}\n{self.legend}"
        return f"{sets}\n\n{self.layer_table(10)}\n{LAYER_LEGEND}"

    def save_plot(self, file: str | Path) -> None:
        """Plot what answers lose against all bytes, a point a candidate, as SVG (or what the file's ending says).

        MissingExtraError without the extra `plot`; ConfigError for a file that cannot be written.
        """
        figure = require_matplotlib()(figsize=(9, 6), layout="constrained")
        axes = figure.add_subplot()
        best = self.best()
        points = {
            index: (candidate.weight_bytes / 1e6, candidate.kl)
            for index, candidate in enumerate(self.candidates)
            if math.isfinite(candidate.kl)
        }
        above = [kl for _, kl in points.values() if kl > 0]
        axes.set_yscale("symlog", linthresh=min(above, default=1e-6))
        line = sorted(points[index] for index in best)
        axes.plot([x for x, _ in line], [y for _, y in line], "--", color="0.7", zorder=1)
        for index, (x, y) in points.items():
            label = f"{_label(index, self.candidates[index])}{_measured(self.candidates[index])}"
            look = {"marker": "*", "s": 130} if index in best else {"marker": "o", "s": 45}
            axes.scatter([x], [y], label=label.replace("$", r"\$"), zorder=2, **look)
        axes.margins(0.1)
        axes.set_ylim(bottom=0)
        figure.canvas.draw()  # places are known from here on
        for letters, place in _together(points, axes):
            axes.annotate(
                letters, place, xytext=(8, 8), textcoords="offset points", fontsize=11, weight="bold"
            )
        axes.set_xlabel("all packed weights, MB")
        axes.set_ylabel("KL to the stored weights in float32, nats a token")
        axes.set_title(f"{self.model}\nstars: no other set has both fewer bytes and a lower KL", fontsize=10)
        figure.legend(loc="outside lower left", fontsize=8)
        axes.grid(alpha=0.3)
        save_figure(figure, file)


LAYER_LEGEND = (
    "error: how far a layer's weights are from the stored ones, relative (1e-2 is 1 %); kB: packed."
)


def letter(index: int) -> str:
    """Return the letter that a candidate goes by: A to Z, then AA and so on."""
    return (letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Tell whether a point is nowhere above another, and somewhere below it."""
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def _label(index: int, candidate: Candidate) -> str:
    name = candidate.name or "as stored"
    return f"{letter(index)}: {name if len(name) <= 90 else f'{name[:87]}...'}"


def _measured(candidate: Candidate) -> str:
    perplexity = candidate.end_to_end.perplexity.get("model")
    more = "" if perplexity is None else f", perplexity {perplexity:.3f}"
    return f" ({candidate.weight_bytes / 1e6:.1f} MB, KL {candidate.kl:.2e}{more})"


def _aligned(titles: list[str], rows: list[list[str]]) -> str:
    """Write cells in columns, to the right but for the last one."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)][:-1]
    lines = []
    for row in (titles, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines)


def _together(points: dict[int, tuple[float, float]], axes: Any) -> list[tuple[str, tuple[float, float]]]:
    """Join the letters of points that lie so near that letters would cover each other: (letters, a place) each."""
    found: list[tuple[list[str], tuple[float, float], Any]] = []
    for index, point in sorted(points.items(), key=lambda item: item[1]):
        place = axes.transData.transform(point)
        near = next((one for one in found if max(abs(one[2] - place)) < 24), None)
        if near is None:
            found.append(([letter(index)], point, place))
        else:
            near[0].append(letter(index))
    return [(", ".join(letters), point) for letters, point, _ in found]


@checked()
def compare(
    path: str | Path | None = None,
    candidates: Sequence[str] = (),
    *,
    text: str | Path | None = None,
    tokens: int = 2048,
    window: int = 512,
    **options: Unpack[LoadOptions],
) -> Comparison:
    """Load the model under each set of rules in turn, verify it and measure its answers.

    path: a folder of config.json and safetensors files, a .gguf file, or a hub id "org/name"; None: the small
    model that comes with the package.
    candidates: the sets of rules; a set is "PATTERN=METHOD" rules separated by ";", or "@FILE"; "": as stored.
    text: a file to measure on, with its perplexity; None: random token ids.
    tokens: how many token ids to measure on.
    window: how many of these are run together, as a text of its own.
    device: "auto" (a GPU where there is one), "cpu", "cuda" or, of several GPUs, "cuda:1".
    dtype: of what layers pass to each other, "bfloat16" say; "auto": the checkpoint's own, but float32 on a CPU for a
    quantised one.
    compute: "auto" lets kernels round their inputs to fewer bits where that is faster, "exact" forbids it, "checkpoint"
    demands just what the checkpoint asks for.
    kernels: the kernel of an operation by name, {"linear": "reference"} say; None: the best that can.
    kv_cache: how keys and values are stored: "fp8", "int8", "none", a dtype's name, or such methods for patterns of
    attention layers; None: as the checkpoint says.
    revision: a branch, tag or commit of a hub id; None: its main branch.
    definition: "auto" runs the page of the model type (pymllm/models), and transformers' class where there is none;
    "transformers" runs its class in any case.
    strategy: how answers are decoded, "block_diffusion:block_length=32" say; None: as the model was trained for.

    Returns the `Comparison`; str() says it in a table.
    Raises whatever loading would raise under any of the rules; ConfigError without candidates.
    """
    if not candidates or isinstance(candidates, str):
        raise ConfigError(
            "there are no sets of rules to compare",
            code="compare-argument",
            expected='a list of them, ["", "**.mlp.**=fp8"] say',
            found=repr(candidates),
        )
    path = shipped_model() if path is None else path
    found = []
    for name in candidates:
        rules = split_rules(name)
        planned = plan(path, rules, **options)
        verification = verify(
            path, rules, end_to_end=True, text=text, tokens=tokens, window=window, **options
        )
        assert verification.end_to_end is not None
        found.append(
            Candidate(
                name,
                rules,
                verification.ok,
                planned.totals["weight_bytes"],
                _layers(planned, verification),
                verification.end_to_end,
            )
        )
    return Comparison(str(path), found)


def split_rules(text: str) -> list[str]:
    """Split the rules of one candidate, which ";" separates; "@FILE" is one of them."""
    return [rule.strip() for rule in text.split(";") if rule.strip()]


def _layers(planned: Plan, verification: Verification) -> list[ComparedLayer]:
    """Join each layer's check with its bytes of the plan."""
    sizes = {layer.prefix: layer.bytes for layer in planned.layers}
    found = []
    for check in verification.layers:
        parts = check.prefix.split(" + ")
        if check.kind == "experts":
            parts = [name for name in sizes if name.startswith(f"{check.prefix}.")]
        nbytes = sum(sizes.get(part, 0) for part in parts)
        found.append(ComparedLayer(check.prefix, check.kind, check.method, nbytes, check.quantisation_error))
    return found
