"""The weights of any torch module through our formats and kernels: `quantize_model`, in place.

    model = AutoModelForCausalLM.from_pretrained(...)
    pymllm.quantize_model(model, {"gpt_neox.layers.**": "int4:group_size=64"})
    model.generate(...)

`nn.Linear`, `nn.Embedding` and GPT-2's `Conv1D` become layers with the same forward. They are for inference: weights
get no gradients, and some kernels pass none to their inputs.
"""

# O out_features, I in_features

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from pymllm.config import Execution, parse_dtype
from pymllm.errors import ConfigError, RuleError
from pymllm.kernels.canonical import DenseWeight
from pymllm.kernels.registry import Operation, kernels_for
from pymllm.layers.linear import WeightedLayer
from pymllm.parallel import Parallel
from pymllm.quantization.base import ConvertedLinearMethod, LinearMethodBase, get_quantization_config
from pymllm.quantization.binding import BoundWeight, bind, bind_shared
from pymllm.quantization.rules import RuledConfig, RuleSource, read_rules
from pymllm.weights.spec import FLOATS, LinearShape, Span

PACKED = "packed_"  # of buffers: packed_codes, packed_scales, ...
FORMAT = "format"  # the buffer that says what the others are
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class QuantizedModule:
    """One module that was replaced, by its path.

    kind: linear or embedding.  numerics: of the kernel, as in a plan.  bytes: of the weight alone.
    tied_to: the module whose packed tensors this one shares.
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


def quantize_model(
    module: M, rules: RuleSource, *, dtype: str | torch.dtype | None = None, compute: str = "auto"
) -> M:
    """Replace the submodules that `rules` name by quantised ones, in place, and return `module`.

    rules: as for `load_model`, over module paths ("bert.encoder.layer.*.attention.**=int4:group_size=64"); the first
    match wins, and "=none" leaves a module alone. What they can name: nn.Linear and nn.Embedding (subclasses too,
    unless they have a forward of their own) and transformers' Conv1D.
    dtype: of the arithmetic; None: each weight's own. Inputs are cast to it and outputs back to the inputs' dtype.
    compute: as for `load_model`.

    Modules that share one weight share the packed one if their methods are equal; else each has its own, made from
    the same floats, and one that no rule names keeps the floats. `module.quantization` lists what was replaced.
    `state_dict` holds the packed tensors; a module quantised by the same rules loads them, on other hardware too.
    Every rule and shape is checked before the first module is replaced.

    Raises RuleError (unmatched or shadowed rules, with nearest names), ConfigError or KernelError.
    """
    if compute not in ("auto", "exact", "checkpoint"):
        raise ConfigError(
            "unknown compute mode", code="compute", expected="auto, exact or checkpoint", found=compute
        )
    jobs = _jobs(module, RuledConfig(get_quantization_config("none").from_config({}), read_rules(rules)))
    executions = {job.name: _execution(job, dtype, compute) for job in jobs}
    for job in jobs:
        job.method.target.check(job.shape)
        bind(job.method.planned(job.shape), executions[job.name], job.operation)
    # What modules with one weight and one method have in common: they share the packed weight.
    keys = {job.name: (_identity(job.module), job.method, executions[job.name]) for job in jobs}
    shared: dict[Any, QuantizedLayer] = {}
    report: list[QuantizedModule] = []
    owners = {
        name: child
        for name, child in module.named_modules(remove_duplicate=False)
        if _matrix_kind(child) is None
    }
    for job in _drain(jobs):  # each module's floats are freed before the next one's are packed
        other = shared.get(keys[job.name])
        layer = job.replacement(executions[job.name], None if other is None else other.bound)
        shared.setdefault(keys[job.name], layer)
        shares = other is not None and _same_tensors(layer.bound, other.bound)
        report.append(job.report(layer, other.prefix if shares and other is not None else None))
        for name in job.names:
            parent, _, attribute = name.rpartition(".")
            setattr(owners[parent], attribute, layer)
        del job
    module.quantization = [*getattr(module, "quantization", []), *report]  # type: ignore[assignment]
    return module


def _drain(jobs: list[_Job]) -> Iterator[_Job]:
    jobs.reverse()
    while jobs:
        yield jobs.pop()


def _identity(module: nn.Module) -> Any:
    """Equal for modules that hold the very same weight."""
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
    """A module to replace.  names: all the paths that it stands at, the first one its own."""

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

    def replacement(self, execution: Execution, shared: BoundWeight | None) -> QuantizedLayer:
        """shared: the same weight, packed for another module of the same method."""
        with torch.no_grad():
            if shared is not None:
                bound = bind_shared(shared, execution, self.operation)
            else:
                weight = DenseWeight(_matrix(self.module).detach())
                bound = bind(self.method.convert(weight, self.shape), execution, self.operation)
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
    """What the rules replace.  RuleError for a rule without effect, ConfigError for what cannot be replaced."""
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
                f"Modules that can be named are like {known[0]}." if known else "It has no such modules."
            )
        error.args = (str(error),)
        raise
    return jobs


KINDS = (nn.Linear, nn.Embedding)


def _matrix_kind(module: nn.Module) -> type | str | None:
    """nn.Linear, nn.Embedding or "Conv1D" if the module's forward is that one's; else None."""
    for kind in KINDS:
        if isinstance(module, kind):
            return kind if type(module).forward is kind.forward else None
    is_conv1d = type(module).__name__ == "Conv1D" and hasattr(
        module, "nf"
    )  # transformers', told without importing it
    return "Conv1D" if is_conv1d else None


def _matrix(module: nn.Module) -> Tensor:
    """The weight as [O, I]; of an embedding, [V, H]."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if _matrix_kind(module) == "Conv1D" else weight


def _check_replaceable(module: nn.Module, name: str) -> None:
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
            else "Wrap it in another module, nn.Sequential say.",
        )


class QuantizedLayer(WeightedLayer):
    """A packed weight in the place of a module's own.  Its buffers are the packed tensors, and say what they are."""

    bound: BoundWeight
    operation: ClassVar[str] = "linear"

    def __init__(
        self,
        prefix: str,
        shape: LinearShape,
        method: LinearMethodBase,
        execution: Execution,
        bound: BoundWeight,
    ) -> None:
        with execution, Parallel():
            super().__init__(prefix, shape.dtype)
        self.shape, self.quant_method = shape, method
        self.in_features, self.out_features = shape.in_features, shape.out_features
        self._hold(bound, execution)

    @property
    def weight(self) -> Tensor:
        """The weight as floats, decoded anew each time: for code that reads a module's weight besides calling it."""
        return self.bound.canonical().dequantize(self.bound.problem.dtype)

    def extra_repr(self) -> str:
        kernel = self.bound.selection.kernel.name
        return f"{self.out_features} x {self.in_features}, {self.quant_method.describe()} -> {kernel}"

    def _hold(self, bound: BoundWeight, execution: Execution) -> None:
        self.bound, self.execution = bound, execution
        for name in list(self._buffers):
            delattr(self, name)
        for name, tensor in self._held().items():
            self.register_buffer(PACKED + name, tensor)

    def _held(self) -> dict[str, Tensor]:
        """What a state dict holds of the weight."""
        bound = self.bound
        order = {} if bound.input_order is None else {"input_order": bound.input_order}
        device = next(iter(bound.packed.values())).device
        return {**bound.packed, **order, FORMAT: _as_bytes(_format_of(bound)).to(device)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        """`to`, `half`, `cuda`...: packed tensors are never cast or moved as they are, but packed again."""
        buffers = dict(self._buffers)
        self._buffers.clear()
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(buffers)
        bound = self.bound
        first = next(iter(bound.packed.values()))
        like = fn(torch.empty(0, dtype=bound.problem.dtype, device=first.device))
        if (like.device, like.dtype) != (first.device, bound.problem.dtype):
            dtype = like.dtype if like.dtype in FLOATS else bound.problem.dtype
            assert self.execution is not None
            execution = replace(self.execution, device=like.device.type, dtype=dtype)
            weight = bound.canonical()
            moved = {name: tensor.to(like.device) for name, tensor in weight.tensors().items()}
            order = getattr(weight, "input_order", None)
            if order is not None:
                moved["input_order"] = order.to(like.device)
            self._hold(bind(replace(weight, **moved), execution, self._operation()), execution)  # type: ignore[arg-type]
        return self

    def _operation(self) -> Operation:
        return "embedding" if self.operation == "embedding" else "linear"

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        start = prefix + PACKED
        saved = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
        if saved:
            try:
                bound = self._read(saved)
            except ConfigError as error:
                error_msgs.append(str(error))
                return
            assert self.execution is not None
            self._hold(bound, self.execution)
            state_dict = {key: value for key, value in state_dict.items() if not key.startswith(start)}
            state_dict |= {start + name: tensor for name, tensor in self._held().items()}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _read(self, saved: dict[str, Tensor]) -> BoundWeight:
        """This layer's weight as another one saved it, packed for the kernel here.  ConfigError if unlike."""
        bound, mine = self.bound, _format_of(self.bound)
        try:
            theirs = json.loads(bytes(saved.pop(FORMAT).cpu().tolist()))
        except (KeyError, ValueError):
            raise self._unlike(
                "the state dict does not say what its packed tensors are", mine, "nothing"
            ) from None
        for setting in ("weight", "shape"):
            if theirs.get(setting) != mine[setting]:
                raise self._unlike(f"another {setting} was saved", mine[setting], theirs.get(setting))
        kernels = {kernel.name: kernel for kernel in kernels_for(self._operation())}
        kernel = kernels.get(theirs["kernel"])
        if kernel is None:
            raise self._unlike(
                "it was packed for a kernel that is not known here", list(kernels), theirs["kernel"]
            )
        device = next(iter(bound.packed.values())).device
        saved = {name: tensor.detach().to(device, copy=True) for name, tensor in saved.items()}
        order = saved.pop("input_order", None)
        dtype = getattr(torch, theirs["dtype"])
        if kernel.name == bound.selection.kernel.name and dtype is bound.problem.dtype:
            expected = {name: (t.shape, t.dtype) for name, t in bound.packed.items()}
            found = {name: (t.shape, t.dtype) for name, t in saved.items()}
            if expected != found:
                raise self._unlike("its packed tensors are of other shapes", expected, found)
            return replace(bound, packed=saved, input_order=order)
        weight = kernel.unpack(saved, replace(bound.problem, dtype=dtype))
        if order is not None:
            weight = replace(weight, input_order=order)
        assert self.execution is not None
        return bind(weight, self.execution, self._operation())

    def _unlike(self, problem: str, expected: Any, found: Any) -> ConfigError:
        return ConfigError(
            problem, code="state-dict", tensor=self.prefix, expected=str(expected), found=str(found)
        )


class QuantizedLinear(QuantizedLayer):
    """nn.Linear's forward."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [*, I], any float dtype.  Returns [*, O] in the same dtype."""
        inputs = x.to(self.bound.problem.dtype)
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        y = self.quant_method.apply(self, inputs, bias)
        return (self.add_lora(inputs, y) if self.adapters else y).to(x.dtype)


class QuantizedEmbedding(QuantizedLayer):
    """nn.Embedding's forward."""

    kind: ClassVar[str] = "embedding"
    operation: ClassVar[str] = "embedding"

    @property
    def num_embeddings(self) -> int:
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    def forward(self, ids: Tensor) -> Tensor:
        """ids: any shape.  Returns [*ids.shape, H]."""
        rows = self.quant_method.embed(self, ids)
        return self.add_lora_rows(ids, rows) if self.adapters else rows


def _format_of(bound: BoundWeight) -> dict[str, Any]:
    """What a state dict must say of packed tensors for another kernel to read them."""
    return {
        "weight": str(bound.problem.weight),
        "shape": [bound.problem.out_features, bound.problem.in_features],
        "kernel": bound.selection.kernel.name,
        "dtype": str(bound.problem.dtype).removeprefix("torch."),
    }


def _as_bytes(value: dict[str, Any]) -> Tensor:
    """As a tensor, since safetensors holds nothing else."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def quantized_layers(module: nn.Module) -> Iterator[QuantizedLayer]:
    """The layers that `quantize_model` put into `module`."""
    for child in module.modules():
        if isinstance(child, QuantizedLayer):
            yield child
