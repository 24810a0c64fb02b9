"""`verify`: does what runs compute what the checkpoint says?  Every layer's kernel against float64 over its tensors.

The reference reads each layer's tensors from the file again, decodes them with the format alone and multiplies in
float64; the packed weights, the kernel and its activation dtype are what is under test.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pymllm.arguments import checked
from pymllm.checking.divergence import EndToEnd, measure_end_to_end
from pymllm.errors import ConfigError, counted
from pymllm.kernels.canonical import relative_error
from pymllm.layers.held import HeldWeight, Trial
from pymllm.loading.load import load_prepared
from pymllm.loading.match import Placement
from pymllm.loading.options import LoadOptions
from pymllm.loading.prepare import Prepared, prepare
from pymllm.loading.stored import read_held
from pymllm.planning.make_plan import check_fits, make_plan
from pymllm.quantization.rules import RuleSource

if TYPE_CHECKING:
    from typing_extensions import Unpack


TITLES = ["error", "large", "allowed", "by rule", "layer (method -> kernel)"]
LEGEND = (
    "error: of the kernel's answers, relative to float64 (1e-2 is 1 %), for ordinary inputs; large: for large ones;",
    "allowed: what the dtype and the kernel's own rounding explain; by rule: how far the weights that run are from",
    "the stored ones, where a rule converts them.",
)


@dataclass(frozen=True)
class LayerCheck:
    """The check of one layer (or one part of it).

    prefix, kind: of the layer.  method, kernel, numerics: what runs, for people.
    errors: relative error to float64 by magnitude of the inputs.  tolerance: what its dtype and numerics explain.
    packed_exact: whether the packed weight decodes to the very values of the format.
    quantisation_error: relative distance of the weight that runs to the one stored, where a rule converts; else 0.
    """

    prefix: str
    kind: str
    method: str
    kernel: str
    numerics: str
    errors: dict[str, float]
    tolerance: float
    packed_exact: bool
    quantisation_error: float

    @property
    def worst(self) -> float:
        """The largest error, in units of the tolerance; NaN counts as infinite."""
        ratios = [error / self.tolerance for error in self.errors.values()]
        return max(math.inf if math.isnan(ratio) else ratio for ratio in ratios)

    @property
    def ok(self) -> bool:
        return self.packed_exact and self.worst <= 1


@dataclass(frozen=True)
class Verification:
    """The checks of all layers, the worst first.  end_to_end: None: it was not asked for."""

    model: str
    layers: list[LayerCheck]
    end_to_end: EndToEnd | None = None

    @property
    def ok(self) -> bool:
        return all(layer.ok for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        layers = [{**asdict(layer), "worst": layer.worst, "ok": layer.ok} for layer in self.layers]
        whole = None if self.end_to_end is None else asdict(self.end_to_end)
        return {
            "schema_version": 1,
            "model": self.model,
            "ok": self.ok,
            "layers": layers,
            "end_to_end": whole,
        }

    def table(self, top: int | None = None) -> str:
        """List the worst `top` layers (None: all), one a line, for people."""
        lines = ["  ".join([*(title.rjust(8) for title in TITLES[:-1]), TITLES[-1]])]
        lines += ["  ".join([*(cell.rjust(8) for cell in row[:-1]), row[-1]]) for row in self.rows(top)]
        return "\n".join([*lines, *LEGEND])

    def rows(self, top: int | None = None) -> list[list[str]]:
        """Write a row of cells for each of the worst `top` layers (None: all); `TITLES` names the cells."""
        rows = []
        for layer in self.layers[:top]:
            state = "" if layer.ok else "  FAILS" + ("" if layer.packed_exact else ": packed weight differs")
            errors = layer.errors["ordinary"], layer.errors["large"]
            cells = [f"{value:.2e}" for value in (*errors, layer.tolerance, layer.quantisation_error)]
            rows.append([*cells, f"{layer.prefix} ({layer.method} -> {layer.kernel}){state}"])
        return rows

    def __str__(self) -> str:
        failed = sum(not layer.ok for layer in self.layers)
        verdict = "all within tolerance" if self.ok else f"{failed} FAIL"
        checked = counted(len(self.layers), "layer")
        lines = [f"{self.table(10)}\n{self.model}: {checked} against float64, {verdict}"]
        return "\n".join(lines + (self.end_to_end.lines() if self.end_to_end else []))


@checked()
def verify(
    path_or_model: str | Path | Any = None,
    quant: RuleSource = None,
    *,
    end_to_end: bool = False,
    text: str | Path | None = None,
    tokens: int = 2048,
    window: int = 512,
    check_memory: bool = True,
    **options: Unpack[LoadOptions],
) -> Verification:
    """Check every layer that holds weights against float64 over the checkpoint's own tensors.

    path_or_model: a folder of config.json and safetensors files, a .gguf file, or a hub id "org/name", which is loaded;
    None: the small model that comes with the package; or a loaded model (`load_model`'s, or an `LLM`), whose checkpoint
    is read again. The other arguments go with a path alone:
    quant: rules over the checkpoint's own config, {"**.mlp.**": "fp8"} say; also a list of "PATTERN=METHOD" lines, or
    "@FILE"; None: as stored.
    end_to_end: whether to compare next-token distributions, too, with those of the weights in float32, as they are read
    from the same files here.
    text: a file to compare them on, with its perplexity, which asks for end_to_end, too; None: random token ids.
    tokens: how many token ids to compare them on.
    window: how many of these are run together, as a text of its own.
    check_memory: whether to refuse, with numbers, a model that the plan says does not fit into what is free.
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

    Returns the `Verification`; str() says it in a few lines.
    Raises whatever loading would raise; ConfigError for arguments that do not go together.
    """
    whole = None
    if path_or_model is None or isinstance(path_or_model, (str, Path)):
        prepared = prepare(path_or_model, quant, **options)
        if check_memory:
            check_fits(prepared, make_plan(prepared))
        model = load_prepared(prepared)
        if end_to_end or text is not None:
            same = {name: value for name, value in options.items() if name in ("device", "revision")}
            again = {"path": path_or_model, "quant": quant, **same}
            whole = measure_end_to_end(prepared, model, again, text=text, tokens=tokens, window=window)
    else:
        found = getattr(path_or_model, "prepared", None)
        asked = quant is not None or end_to_end or text is not None or options
        if asked or not isinstance(found, Prepared):
            raise ConfigError(
                "verify takes a checkpoint, or a model that is loaded; rules and options go with a checkpoint alone",
                code="verify-argument",
                found=type(path_or_model).__name__ + (", with other arguments" if asked else ""),
            )
        prepared = found
    with prepared.checkpoint, torch.no_grad():
        placements: dict[nn.Module, list[Placement]] = {}
        for unit in prepared.units:
            for placement in unit.placements:
                placements.setdefault(placement.module, []).append(placement)

        def stored(weight: HeldWeight) -> dict[str, Tensor]:
            return read_held(weight, placements.get(weight.stored_in, []))

        checks = [_check(trial) for unit in prepared.units for trial in unit.holder.trials(stored)]
    worst_first = sorted(checks, key=lambda check: check.worst, reverse=True)
    return Verification(str(prepared.checkpoint.path), worst_first, whole)


def _check(trial: Trial) -> LayerCheck:
    """Compare the packed weights with the file's, and the kernel's answers with float64."""
    bound, kernel = trial.bound, trial.bound.selection.kernel
    exact, changed = True, 0.0
    for wanted, original, packed in trial.weights:
        exact &= torch.equal(packed, wanted)
        if original is not None:
            changed = max(changed, relative_error(wanted, original))
    generator = torch.Generator().manual_seed(zlib.crc32(trial.name.encode()))
    errors = {}
    for label, magnitude in trial.magnitudes.items():
        got, want = trial.answer(generator, magnitude)
        errors[label] = relative_error(got.double().cpu(), want)
    return LayerCheck(
        trial.name,
        trial.kind,
        trial.method,
        kernel.name,
        kernel.numerics(bound.problem),
        errors,
        bound.tolerance,
        exact,
        changed,
    )
