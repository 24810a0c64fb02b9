"""`compare`: several sets of rules for one model, side by side: bytes, errors of weights, divergence of the answers.

pymllm.compare("org/model", ["", "**.layers.**=int8", "**.layers.**=int4"], text="held-out.txt")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymllm.checking.divergence import EndToEnd
from pymllm.checking.figures import require_matplotlib, save_figure
from pymllm.checking.verify import Verification, verify
from pymllm.loading.options import LoadOptions
from pymllm.planning.make_plan import plan
from pymllm.planning.plan import Plan

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


@dataclass(frozen=True)
class Comparison:
    """The sets of rules, in the order in which they were given."""

    model: str
    candidates: list[Candidate]

    @property
    def ok(self) -> bool:
        return all(candidate.ok for candidate in self.candidates)

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, "ok": self.ok, **asdict(self)}

    def table(self) -> str:
        """Write one line for each set of rules: bytes, divergence, with text the perplexity."""
        with_text = any(candidate.end_to_end.perplexity for candidate in self.candidates)
        title = f"{'weights':>10} {'KL':>9} {'top 1':>8}"
        lines = [title + (f" {'perplexity':>10}" if with_text else "") + "  rules"]
        for index, candidate in enumerate(self.candidates):
            whole = candidate.end_to_end
            against = whole.rules or whole.kernels
            line = f"{candidate.weight_bytes / 1e6:8.1f}MB {against.kl:9.2e} {against.top1:8.2%}"
            if with_text:
                line += f" {whole.perplexity.get('model', float('nan')):10.3f}"
            failed = "" if candidate.ok else "  (a kernel FAILS: pymllm verify)"
            lines.append(f"{line}  {_label(index, candidate)}{failed}")
        return "\n".join(lines)

    def layer_table(self, top: int | None = None) -> str:
        """List the `top` layers of largest error (None: all): error and bytes under each set of rules."""
        names = list(dict.fromkeys(layer.prefix for c in self.candidates for layer in c.layers))
        by_name = [{layer.prefix: layer for layer in c.layers} for c in self.candidates]
        names.sort(key=lambda name: -max(c[name].error for c in by_name if name in c))
        letters = map(_letter, range(len(by_name)))
        lines = ["".join(f"{f'error {c}':>10} {f'kB {c}':>9}" for c in letters) + "  layer"]
        for name in names[:top]:
            cells = "".join(
                f"{c[name].error:10.2e} {c[name].bytes / 1e3:9.1f}" if name in c else " " * 20
                for c in by_name
            )
            lines.append(f"{cells}  {name}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.layer_table(10)}"

    def save_plot(self, file: str | Path) -> None:
        """Plot error against bytes, a point a layer, as SVG (or what the file's ending says).

        MissingExtraError without the extra `plot`; ConfigError for a file that cannot be written.
        """
        figure = require_matplotlib()(figsize=(9, 6), layout="constrained")
        axes = figure.add_subplot()
        for index, candidate in enumerate(self.candidates):
            layers = [layer for layer in candidate.layers if layer.bytes]
            axes.scatter(
                [layer.bytes for layer in layers],
                [layer.error for layer in layers],
                s=18,
                alpha=0.7,
                label=_label(index, candidate)[:80],
            )
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=1e-4)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("bytes of the layer's packed weights")
        axes.set_ylabel("relative error of the weights, to the stored ones")
        axes.set_title(self.model)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        save_figure(figure, file)


def _letter(index: int) -> str:
    """Return the letter that a candidate goes by."""
    return chr(ord("A") + index % 26)


def _label(index: int, candidate: Candidate) -> str:
    return f"{_letter(index)}: {candidate.name or 'as stored'}"


def compare(
    path: str | Path,
    candidates: Sequence[str],
    *,
    text: str | Path | None = None,
    tokens: int = 2048,
    window: int = 512,
    **options: Unpack[LoadOptions],
) -> Comparison:
    """Load the model under each set of rules in turn, verify it and measure its answers.

    path: a folder of config.json and safetensors files, a .gguf file, or a hub id "org/name".
    candidates: the sets of rules; a set is "PATTERN=METHOD" rules separated by ";", or "@FILE"; "": as stored.
    text: a file to measure on, with its perplexity; None: random token ids.
    tokens: how many token ids to measure on.
    window: how many of these are run together, as a text of its own.
    device: "auto" (a GPU where there is one), "cpu" or "cuda".
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
    Raises whatever loading would raise under any of the rules.
    """
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
