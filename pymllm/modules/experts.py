"""The experts that `quantize_model` puts in place of a module's own: packed, and called as the module was."""

# T tokens, K experts a token, E experts, H hidden size, I intermediate size

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.config import Execution
from pymllm.kernels.canonical import CanonicalWeight
from pymllm.kernels.experts import ExpertsBias, ExpertsProblem, ExpertsWeight, LazyWeights
from pymllm.kernels.linear_experts import INPUT_ORDER, PackedExperts
from pymllm.kernels.registry import kernels_for
from pymllm.modules.foreign_experts import ForeignExperts, OwnGate
from pymllm.modules.packed import PackedBuffers, moved
from pymllm.quantization.experts import BoundExperts, bind_experts
from pymllm.quantization.method import LinearMethodBase

# Of a packed tensor's product and name, in a buffer's name: "gate_up.blocks" may not be one.
BETWEEN = "-"


class QuantizedExperts(PackedBuffers):
    """The experts of a layer, packed, behind the forward of the module whose place they take.

    methods: by product, gate_up and down.  biases: by the module's names for them, which stay those of parameters.
    A stack's name, such as `gate_up_proj`, decodes it anew each time, in the layout that the module had.
    """

    kind: ClassVar[str] = "experts"
    bound: BoundExperts

    def __init__(
        self,
        prefix: str,
        facts: ForeignExperts,
        methods: Mapping[str, LinearMethodBase],
        execution: Execution,
        bound: BoundExperts,
        biases: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.prefix, self.facts, self.methods = prefix, facts, dict(methods)
        self.num_experts = facts.num_experts
        self._biases: tuple[Tensor, Tensor] | None = None  # in the kernel's order
        for name in facts.bias_names:
            self.register_parameter(name, nn.Parameter(biases[name].detach().clone(), requires_grad=False))
        own: Any = getattr(facts.activation, "function", None)
        if isinstance(own, OwnGate):  # so that what the activation holds moves and is saved with the experts
            for name, child in own.husk.named_children():
                self.add_module(name, child)
        self._hold(bound, execution)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the experts' answers, as the module did whose place they take: see `ForeignExperts.calls`.

        Indices beyond the experts' add nothing, or their input where the module says so.  Returns the shape and dtype
        of the first argument.
        """
        x, ids, weights = self.facts.routed(args, kwargs)
        y = self._answers(x.reshape(-1, self.facts.hidden_size), ids.long(), weights.float()).to(x.dtype)
        return y if self.facts.calls == "sorted" else y.reshape(x.shape)

    def _answers(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Run the kernel.  rows: [T, H].  ids, weights: [T, K]."""
        count, dtype = self.facts.num_experts, self.bound.problem.dtype
        inputs = rows.to(dtype)
        if self._biases is None and self.facts.bias:
            self._biases = self.facts.biases(dict(self._parameters))  # type: ignore[arg-type]
        bias = ExpertsBias(*(self._biases or (None, None)))
        y = self.bound.run(inputs, ids.masked_fill(ids >= count, -1), weights, bias)
        if not self.facts.identities:
            return y
        passed = (ids >= count) & (ids < count + self.facts.identities)
        return y + rows * (weights * passed).sum(1, keepdim=True)

    def __getattr__(self, name: str) -> Any:
        facts = self.__dict__.get("facts")
        if facts is not None and name in facts.names:
            return self._stack(name)
        return super().__getattr__(name)

    def _stack(self, name: str) -> Tensor:
        """Decode a stack, in the layout that the module had."""
        facts, dtype = self.facts, self.bound.problem.dtype
        products = self.bound.canonical().products()
        if name == facts.down:
            weight = torch.stack([one.dequantize(dtype) for one in products["down"]])
        else:
            weight = torch.stack([one.dequantize(dtype) for one in products["gate_up"]])
            weight = weight.chunk(len(facts.gate_up), dim=1)[facts.gate_up.index(name)]
            if facts.interleaved:
                weight = torch.stack(weight.chunk(2, dim=1), dim=2).flatten(1, 2)
        return weight.transpose(1, 2) if facts.transposed else weight

    def extra_repr(self) -> str:
        said = " | ".join(dict.fromkeys(method.describe() for method in self.methods.values()))
        kernel = self.bound.selection.kernel.name
        return f"{self.num_experts} x ({self.facts.hidden_size}, {self.facts.intermediate_size}), {said} -> {kernel}"

    def _hold(self, bound: BoundExperts, execution: Execution) -> None:
        self._biases = None
        super()._hold(bound, execution)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedExperts:
        self._biases = None
        super()._apply(fn, recurse)
        return self

    # What `PackedBuffers` asks

    def _tensors(self) -> dict[str, Tensor]:
        return {key.replace(".", BETWEEN): tensor for key, tensor in self.bound.packed.items()}

    def _described(self) -> dict[str, Any]:
        problem, kernel = self.bound.problem, self.bound.selection.kernel
        products = problem.products()
        return {
            "weight": {name: str(linear.weight) for name, linear in products.items()},
            "shape": {
                name: [problem.num_experts, linear.out_features, linear.in_features]
                for name, linear in products.items()
            },
            "kernel": kernel.name,
            # Each product is packed as this linear kernel packs it.
            "products": {name: kernel.linear_kernel(linear).name for name, linear in products.items()},
            "dtype": str(problem.dtype).removeprefix("torch."),
        }

    def _bind_again(self, execution: Execution, device: torch.device) -> BoundExperts:
        return bind_experts(
            _each(self.bound.canonical(), lambda weight: moved(weight, device)),
            self.facts.activation,
            execution,
        )

    def _read(self, saved: dict[str, Tensor], said: dict[str, Any]) -> BoundExperts:
        bound, mine = self.bound, self._described()
        packed = PackedExperts({key.replace(BETWEEN, "."): t for key, t in saved.items()}, self.num_experts)
        if all(said[key] == mine[key] for key in ("kernel", "products", "dtype")):
            self._same_tensors(packed, bound.packed)
            return replace(bound, packed=packed)
        kernels = _linear_kernels()
        readers = {name: self._known(kernel, kernels) for name, kernel in said["products"].items()}
        weight = _unpacked(packed, bound.problem, readers, getattr(torch, said["dtype"]))
        assert self.execution is not None
        return bind_experts(weight, self.facts.activation, self.execution)


def _linear_kernels() -> dict[str, Any]:
    """List the linear kernels by name, and those that pack the products of experts alone."""
    from pymllm.kernels.triton.experts import WEIGHTS

    return {kernel.name: kernel for kernel in (*WEIGHTS, *kernels_for("linear"))}


def _unpacked(
    packed: PackedExperts, problem: ExpertsProblem, readers: Mapping[str, Any], dtype: torch.dtype
) -> ExpertsWeight:
    """Unpack each expert's products by the linear kernels that packed them.  readers: by product."""

    def product(name: str) -> LazyWeights:
        linear = replace(problem.products()[name], dtype=dtype)

        def expert(index: int) -> CanonicalWeight:
            tensors = packed.expert(index)[name]
            weight = readers[name].unpack(tensors, linear)
            order = tensors.get(INPUT_ORDER)
            return weight if order is None else replace(weight, input_order=order)

        return LazyWeights(expert, problem.num_experts)

    return ExpertsWeight((product("gate_up"),), product("down"))


def _each(weight: ExpertsWeight, change: Any) -> ExpertsWeight:
    """Change the weight of every expert, when it is asked for."""

    def changed(experts: Any) -> LazyWeights:
        return LazyWeights(lambda index: change(experts[index]), len(experts))

    return ExpertsWeight(tuple(map(changed, weight.gate_up)), changed(weight.down))
