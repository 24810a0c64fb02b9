"""`quantize_model`: any torch module runs its weights in our formats and kernels, in place.

    model = AutoModelForCausalLM.from_pretrained(...)
    pymllm.quantize_model(model, {"gpt_neox.layers.**": "int4:group_size=64"})
    model.generate(...)

`nn.Linear`, `nn.Embedding` and GPT-2's `Conv1D` become layers with the same forward. These are for inference: weights
get no gradients, and some kernels pass none to their inputs.
"""

# O out_features, I in_features

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pymllm.config import Execution, parse_dtype
from pymllm.errors import ConfigError, RuleError
from pymllm.kernels.canonical import CanonicalWeight, DenseWeight, Fp8Weight, IntWeight
from pymllm.kernels.registry import Operation
from pymllm.modules.calibration import portions, read_calibration, record
from pymllm.modules.layers import QuantizedEmbedding, QuantizedLayer, QuantizedLinear, moved
from pymllm.quantization.base import get_quantization_config
from pymllm.quantization.binding import BoundWeight, bind, bind_shared
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.rounding.calibrated import (
    InputStatistics,
    needs_inputs,
    quantize_calibrated,
    without_static,
)
from pymllm.quantization.rules import RuledConfig, RuleSource, read_rules
from pymllm.weights.spec import FLOATS, LinearShape, Span

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class QuantizedModule:
    """A report on one module that was replaced.  prefix: its path.

    kind: linear or embedding.  numerics: how the kernel's results differ, as in a plan.
    bytes_before, bytes_after: of the weight alone.  tied_to: the module whose packed tensors this one shares.
    calibration_rows: the number of inputs that its rounding was fitted to.
    """

    prefix: str
    kind: str
    rule: str
    method: str
    kernel: str
    numerics: str
    bytes_before: int
    bytes_after: int
    tied_to: str | None = None
    calibration_rows: int = 0


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
    match wins, and "=none" leaves a module alone. Rules can name nn.Linear and nn.Embedding (subclasses too, unless
    they have a forward of their own) and transformers' Conv1D.
    calibration: inputs to run the module on (each a tensor, a tuple of arguments, or a mapping of keyword arguments).
    The rounding of integer weights is then fitted to the inputs that reach them, and activations=static finds its
    scales.
    algorithm: "gptq" (act_order: the inputs that matter most are rounded first), or "clip" (AWQ's search of ranges,
    without its input scales: a module's forward has no place to fold them into).
    dtype: of the arithmetic; None: each weight's own. Inputs are cast to it, and outputs back to the inputs' dtype.
    compute: as for `load_model`.

    Modules that share one weight share the packed one if their methods are equal. Else each has its own, made from the
    same floats, and a module that no rule names keeps the floats. `module.quantization` lists what was replaced.
    `state_dict` holds the packed tensors; a module quantised by the same rules loads them, on other hardware too.
    Every rule and shape is checked before the first module is replaced.

    Raises RuleError (unmatched or shadowed rules, with nearest names), ConfigError or KernelError.
    """
    if compute not in ("auto", "exact", "checkpoint"):
        raise ConfigError(
            "the compute mode is unknown",
            code="compute",
            expected="auto, exact or checkpoint",
            found=compute,
        )
    inputs = None if calibration is None else read_calibration(calibration, algorithm, act_order)
    jobs = _jobs(module, RuledConfig(get_quantization_config("none").from_config({}), read_rules(rules)))
    executions = {job.name: _execution(job, dtype, compute) for job in jobs}
    sizes: dict[str, int] = {}
    for job in jobs:
        job.method.target.check(job.shape)
        planned = job.planned(calibrated=inputs is not None)
        bind(planned, executions[job.name], job.operation)
        wants_gram = isinstance(planned, IntWeight) and planned.offsets is None and job.operation == "linear"
        sizes[job.name] = job.shape.in_features if wants_gram else 0
    # Modules with equal keys have one weight and one method: they share the packed weight.
    keys = {job.name: (_identity(job.module), job.method, executions[job.name]) for job in jobs}
    shared: dict[Any, QuantizedLayer] = {}
    report: list[QuantizedModule] = []
    owners = {
        name: child
        for name, child in module.named_modules(remove_duplicate=False)
        if _matrix_kind(child) is None
    }
    by_name = {job.name: job for job in jobs}
    for run in portions(sizes) if inputs is not None else [list(sizes)]:
        seen: dict[str, InputStatistics] = {}
        if inputs is not None:
            linear = {name: by_name[name].module for name in run if by_name[name].operation == "linear"}
            seen = record(module, linear, sizes, inputs)
            linear.clear()
        portion = [by_name.pop(name) for name in run]
        jobs = [job for job in jobs if job.name in by_name]
        # Each module's floats are freed before those of the next one are packed.
        for job in _drain(portion):
            other = shared.get(keys[job.name])
            rounding = None
            if inputs is not None and job.operation == "linear":
                rounding = functools.partial(
                    quantize_calibrated,
                    job.method.target,
                    shape=job.shape,
                    statistics=seen.pop(job.name),
                    algorithm=algorithm,
                    act_order=act_order,
                )
            layer = job.replacement(executions[job.name], None if other is None else other.bound, rounding)
            shared.setdefault(keys[job.name], layer)
            shares = other is not None and _same_tensors(layer.bound, other.bound)
            row = job.report(layer, other.prefix if shares and other is not None else None)
            seen_rows = 0 if rounding is None else rounding.keywords["statistics"].rows
            report.append(replace(row, calibration_rows=seen_rows))
            for name in job.names:
                parent, _, attribute = name.rpartition(".")
                setattr(owners[parent], attribute, layer)
            del job, rounding
    module.quantization = [*getattr(module, "quantization", []), *report]  # type: ignore[assignment]
    return module


def _drain(jobs: list[_Job]) -> Iterator[_Job]:
    """Yield jobs in order, and keep none of those that were yielded."""
    jobs.reverse()
    while jobs:
        yield jobs.pop()


def _identity(module: nn.Module) -> Any:
    """Return a value that is equal for modules that hold the very same weight."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.data_ptr(), weight.shape, weight.stride(), weight.dtype


def _execution(job: _Job, dtype: str | torch.dtype | None, compute: str) -> Execution:
    weight: Tensor = job.module.weight  # type: ignore[assignment]
    own = weight.dtype if weight.dtype in FLOATS else torch.float32
    return Execution(weight.device.type, own if dtype is None else parse_dtype(dtype), compute)


def _same_tensors(one: BoundWeight, other: BoundWeight) -> bool:
    pointers = {tensor.data_ptr() for tensor in other.packed.values()}
    return all(tensor.data_ptr() in pointers for tensor in one.packed.values())


@dataclass(frozen=True)
class _Job:
    """A module to replace.  names: all the paths at which it stands; it is reported under the first."""

    names: tuple[str, ...]
    module: nn.Module
    method: ConvertedLinearMethod
    rule: str

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def operation(self) -> Operation:
        return "embedding" if isinstance(self.module, nn.Embedding) else "linear"

    @property
    def shape(self) -> LinearShape:
        out_features, in_features = _matrix(self.module).shape
        dtype = self.module.weight.dtype
        assert isinstance(dtype, torch.dtype)
        return LinearShape(Span.full(in_features), (Span.full(out_features),), (self.name,), dtype)

    def planned(self, *, calibrated: bool) -> CanonicalWeight:
        """Make the weight that the replacement will have, without its data."""
        target = without_static(self.method.target) if calibrated else self.method.target
        planned = replace(self.method, target=target).planned(self.shape)
        if calibrated and needs_inputs(self.method.target) and self.operation == "linear":
            assert isinstance(planned, (IntWeight, Fp8Weight))
            return replace(planned, activations="static", input_scales=torch.empty(1, device="meta"))
        return planned

    def replacement(
        self,
        execution: Execution,
        shared: BoundWeight | None,
        rounding: Callable[[Tensor], CanonicalWeight] | None,
    ) -> QuantizedLayer:
        """Make the layer that replaces the module.

        shared: the same weight, packed already for another module of the same method; None: there is none.
        rounding: rounds the weight by calibration inputs; None: the weight is rounded by itself.
        """
        with torch.no_grad():
            if shared is not None:
                bound = bind_shared(shared, execution, self.operation)
            else:
                floats = _matrix(self.module).detach()
                if rounding is None:
                    made = self.method.convert(DenseWeight(floats), self.shape)
                else:
                    made = moved(rounding(floats.to("cpu", torch.float32).contiguous()), floats.device)
                bound = bind(made, execution, self.operation)
        kind = QuantizedEmbedding if self.operation == "embedding" else QuantizedLinear
        layer = kind(self.name, self.shape, self.method.target, execution, bound)
        layer.register_parameter("bias", getattr(self.module, "bias", None))
        return layer.train(self.module.training)

    def report(self, layer: QuantizedLayer, tied_to: str | None) -> QuantizedModule:
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return QuantizedModule(
            prefix=self.name,
            kind=layer.kind,
            rule=self.rule,
            method=self.method.target.describe(),
            kernel=layer.bound.selection.kernel.name,
            numerics=layer.bound.selection.kernel.numerics(layer.bound.problem),
            bytes_before=0 if tied_to else weight.nbytes,
            bytes_after=0 if tied_to else layer.bound.nbytes,
            tied_to=tied_to,
        )


def _jobs(root: nn.Module, config: RuledConfig) -> list[_Job]:
    """List the modules that the rules replace.

    RuleError for a rule without effect, ConfigError for a module that cannot be replaced.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        if _matrix_kind(module) is not None:
            names.setdefault(module, []).append(name)
    jobs = []
    for module, places in names.items():
        for name in places:
            config.get_quant_method(module, name)
        named = [config.decisions[name] for name in places if config.decisions[name].rule is not None]
        if not named:
            continue
        if len({decision.method for decision in named}) > 1:
            raise RuleError(
                f"one module stands at {' and '.join(places)}, and the rules give it different methods",
                code="rule-conflict",
                fix="Give all its names the same method.",
            )
        method = named[0].method
        if isinstance(method, ConvertedLinearMethod):
            _check_replaceable(module, places[0])
            jobs.append(_Job(tuple(places), module, method, str(named[0].rule)))
    try:
        config.lint()
    except RuleError as error:
        known = [name for places in names.values() for name in places]
        special = [
            name for name, module in root.named_modules() if isinstance(module, KINDS) and name not in known
        ]
        if special and any(rule.matches(name) for rule in config.rules for name in special):
            error.fix = f"{special[0]} has a forward of its own, which a replacement would lose."
        else:
            error.fix = (
                f"Name modules like {known[0]}." if known else "The module has none that a rule can name."
            )
        error.args = (str(error),)
        raise
    return jobs


KINDS = (nn.Linear, nn.Embedding)


def _matrix_kind(module: nn.Module) -> type | str | None:
    """Return nn.Linear, nn.Embedding or "Conv1D" if the module has the forward of that one, else None."""
    for kind in KINDS:
        if isinstance(module, kind):
            return kind if type(module).forward is kind.forward else None
    # transformers' class, recognised without importing it.
    is_conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return "Conv1D" if is_conv1d else None


def _matrix(module: nn.Module) -> Tensor:
    """Return the module's weight as [O, I]; of an embedding as [V, H]."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if _matrix_kind(module) == "Conv1D" else weight


def _check_replaceable(module: nn.Module, name: str) -> None:
    """Check that nothing would be lost if the module were replaced.  ConfigError says what."""
    problem = None
    if not name:
        problem = "the module itself cannot be replaced in place"
    elif module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        problem = "it has hooks, which a replacement would lose"
    elif torch.nn.utils.parametrize.is_parametrized(module):
        problem = "its weight is computed by a parametrization"
    elif getattr(module, "max_norm", None) is not None:
        problem = "its max_norm changes the weight while it runs"
    elif (
        not isinstance(module.weight, Tensor)
        or module.weight.is_meta
        or not module.weight.is_floating_point()
    ):
        problem = "its weight holds no floats"
    if problem is not None:
        raise ConfigError(
            f"{name or type(module).__name__} cannot be quantised: {problem}",
            code="module-unsupported",
            fix="Leave it out with a rule NAME=none before the others."
            if name
            else "Wrap it in another module, in nn.Sequential for example.",
        )
