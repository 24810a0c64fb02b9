"""`quantize_model`: any torch module runs its weights in our formats and kernels, in place.

    model = AutoModelForCausalLM.from_pretrained(...)
    pymllm.quantize_model(model, {"gpt_neox.layers.**": "int4:group_size=64"})
    model.generate(...)
    print(model.quantization)

`nn.Linear`, `nn.Embedding`, GPT-2's `Conv1D`, embeddings that scale their rows and the stacked experts of transformers
become layers with the same forward. These are for inference: weights get no gradients, and some kernels pass none to
their inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pymllm.arguments import checked
from pymllm.errors import ConfigError, KernelError
from pymllm.modules.calibration import portions, read_calibration, record
from pymllm.modules.jobs import Job, rounding_by
from pymllm.modules.named import Named, Unreached
from pymllm.modules.report import QuantizationReport, QuantizedModule
from pymllm.quantization.base import get_quantization_config
from pymllm.quantization.rounding.calibrated import InputStatistics
from pymllm.quantization.rules import RuledConfig, RuleSource, read_rules

M = TypeVar("M", bound=nn.Module)


@checked()
def quantize_model(
    module: M,
    rules: RuleSource,
    calibration: Iterable[Any] | None = None,
    *,
    algorithm: str = "gptq",
    act_order: bool = False,
    dtype: str | torch.dtype | None = None,
    compute: str = "auto",
) -> M:
    """Replace the submodules that `rules` name by quantised ones, in place, and return `module`.

    module: a torch module of any library, which holds its weights.
    rules: as for `load_model`, over module paths ("bert.encoder.layer.*.attention.**=int4:group_size=64"). The first
    match wins, and "=none" leaves a module alone. Rules can name nn.Linear and nn.Embedding (a subclass with a forward
    of its own if that is proven to compute the same, or rows times one number), transformers' Conv1D, and stacked
    experts, by their module's path or that of a tensor ("model.layers.0.mlp.experts.down_proj").
    calibration: inputs to run the module on (each a tensor, a tuple of arguments, or a mapping of keyword arguments).
    The rounding of integer weights is then fitted to the inputs that reach them, and activations=static finds its
    scales.
    algorithm: "gptq" (act_order: the inputs that matter most are rounded first), or "clip" (AWQ's search of ranges,
    without its input scales: a module's forward has no place to fold them into).
    dtype: of the arithmetic; None: each weight's own. Inputs are cast to it, and outputs back to the inputs' dtype.
    compute: as for `load_model`.

    Modules that share one weight share the packed one if their methods are equal. Else each has its own, made from the
    same floats, and a module that no rule names keeps the floats. `module.quantization` is a `QuantizationReport`: what
    was replaced, what a rule ending in "**" could not change with the reason, and the share of all parameters.
    `state_dict` holds the packed tensors; a module quantised by the same rules loads them, on other hardware too.
    Every rule and shape is checked before the first module is replaced.

    Raises RuleError (unmatched or shadowed rules, with nearest names; all that other rules name and that cannot be
    changed) or ConfigError.
    """
    if compute not in ("auto", "exact", "checkpoint"):
        raise ConfigError(
            "the compute mode is unknown",
            code="compute",
            expected="auto, exact or checkpoint",
            found=compute,
        )
    if not isinstance(module, nn.Module):
        raise ConfigError(
            "only a torch module can be quantised in place",
            code="module",
            expected="a torch.nn.Module",
            found=type(module).__name__,
        )
    inputs = None if calibration is None else read_calibration(calibration, algorithm, act_order)
    config = RuledConfig(get_quantization_config("none").from_config({}), read_rules(rules))
    named = Named(module, config)
    for job in list(named.jobs):
        job.set_execution(dtype, compute)
        try:
            job.check(calibrated=inputs is not None)
        except (ConfigError, KernelError) as error:
            named.refuse(job, str(error))
    named.check()
    tally = _Tally(module)
    again = {each.name for each in named.unreached}
    before = [row for row in getattr(module, "quantization", ()) if row.replaced or row.prefix not in again]
    report = QuantizationReport(before)
    jobs = named.take_jobs()
    parents = {name.rpartition(".")[0] for job in jobs for name in job.names}
    owners = {name: module.get_submodule(name) for name in parents}
    keys = {job.name: job.key for job in jobs}
    pending = {name: job for job in jobs for name in job.sizes()}
    sizes = {name: size for job in jobs for name, size in job.sizes().items()}
    left = {job.name: len(job.sizes()) for job in jobs}
    shared: dict[Any, nn.Module] = {}
    rounding = rounding_by(algorithm, act_order)
    for run in portions(sizes) if inputs is not None else [list(sizes)]:
        seen: dict[str, InputStatistics] = {}
        jobs = list(dict.fromkeys(pending.pop(name) for name in run))
        if inputs is not None:
            taps = [tap for job in jobs if (tap := job.tap()) is not None]
            seen = record(module, taps, {name: sizes[name] for name in run}, inputs)
            taps.clear()
        # Each module's floats are freed before those of the next one are packed.
        for job in _drain(jobs):
            if inputs is not None:
                unused = len(seen)
                job.fit(seen, rounding)
                left[job.name] -= unused - len(seen)
                if left[job.name]:
                    continue
            other = shared.get(keys[job.name])
            layer = job.replacement(other)
            shared.setdefault(keys[job.name], layer)
            report += tally.counted(job, layer, other)
            for name in job.names:
                parent, _, attribute = name.rpartition(".")
                setattr(owners[parent], attribute, layer)
            del job
    report += tally.rows(named.unreached)
    module.quantization = report  # type: ignore[assignment]
    return module


def _drain(jobs: list[Job]) -> Iterator[Job]:
    """Yield jobs in order, and keep none of those that were yielded."""
    jobs.reverse()
    while jobs:
        yield jobs.pop()


class _Tally:
    """The elements of a model's parameters with two dimensions or more, each counted in one row alone."""

    def __init__(self, root: nn.Module) -> None:
        held = {_place(p): p.numel() for p in root.parameters() if p.ndim > 1}
        self.total = sum(held.values()) + sum(
            row.parameters for row in getattr(root, "quantization", ()) if row.replaced
        )
        self.counted_already: set[Any] = set()

    def rows(self, unreached: Iterable[Unreached]) -> Iterator[QuantizedModule]:
        """Report on weights that stay as they are."""
        return (self._shared(each.row(), each.weights.values()) for each in unreached)

    def counted(self, job: Job, layer: nn.Module, other: nn.Module | None) -> Iterator[QuantizedModule]:
        """Report on a module that was replaced.  other: see `Job.rows`."""
        rows = list(job.rows(layer, other))
        return (self._shared(row, [weight]) for row, weight in zip(rows, job.weights().values(), strict=True))

    def _shared(self, row: QuantizedModule, weights: Iterable[Tensor]) -> QuantizedModule:
        fresh = {_place(weight): weight.numel() for weight in weights}
        parameters = sum(size for place, size in fresh.items() if place not in self.counted_already)
        self.counted_already |= fresh.keys()
        return replace(row, parameters=parameters, share=parameters / max(self.total, 1))


def _place(weight: Tensor) -> Any:
    """Return a value that is equal for the very same weight."""
    return weight.data_ptr() or id(weight), weight.shape, weight.stride(), weight.dtype
