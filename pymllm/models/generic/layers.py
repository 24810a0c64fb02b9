"""Our layers in the places of transformers' linear layers, embeddings and head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pymllm.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from pymllm.layers.linear import Linear
from pymllm.layers.weighted import WeightedLayer
from pymllm.models.generic.classes import on_cpu
from pymllm.moe.layer import RouterLinear
from pymllm.quantization.base import QuantizationConfig
from pymllm.quantization.binding import bound_weight

# The last words of the names of routers that are linear layers.
ROUTERS = ("gate", "router", "shared_expert_gate")


class ReadWeight:
    """The weight of a layer as code reads it that does more than call the layer: decoded when it is computed with.

    part: which of those that a fused layer has.
    """

    def __init__(self, layer: WeightedLayer, part: int = 0) -> None:
        self.layer, self.part = layer, part
        held = layer.held()
        packed_in = held[part if len(held) > 1 else 0].packed_in
        bound = bound_weight(packed_in)
        assert bound is not None
        self.bound = bound
        self.dtype, self.device = layer.params_dtype, bound.problem.device.torch_device
        shape = layer.shape.part(part)
        self.shape = torch.Size((self._table or shape.out_features_local, shape.in_features_local))

    def decoded(self) -> Tensor:
        """Decode the weight, [O, I]; a transposed one as it is stored."""
        weight = self.bound.canonical().dequantize(self.dtype)
        if self._table:  # all of it, on every rank
            weight = self.layer.parallel.all_gather(weight, dim=0)[: self._table]
        elif weight.shape[0] > self.shape[0]:
            sizes = [span.size for span in self.layer.shape.outputs]
            weight = weight.split(sizes)[self.part]
        return weight.t() if getattr(self.layer, "transposed", False) else weight

    @property
    def _table(self) -> int:
        """The rows of a table that ranks share; 0: the weight is no such table."""
        return getattr(self.layer, "num_embeddings", 0)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(
            lambda one: one.decoded() if isinstance(one, cls) else one, (args, kwargs or {})
        )
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoded(), name)


def _as_tensor(name: str) -> Callable[..., Any]:
    def method(self: ReadWeight, *args: Any) -> Any:
        return getattr(self.decoded(), name)(*args)

    return method


# Python looks an operator up in the class alone.
for _operator in (
    "getitem",
    "len",
    "mul",
    "rmul",
    "add",
    "radd",
    "sub",
    "rsub",
    "truediv",
    "matmul",
    "rmatmul",
    "neg",
):
    setattr(ReadWeight, f"__{_operator}__", _as_tensor(f"__{_operator}__"))


class ReadableWeight(WeightedLayer):
    """A layer whose `weight` can be read once it is packed."""

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and bound_weight(self) is not None:
            return ReadWeight(self)
        return super().__getattr__(name)


class GenericLinear(ReadableWeight, Linear):
    """A linear layer of transformers'."""


class GenericRouter(ReadableWeight, RouterLinear):
    """A linear layer of transformers' that chooses experts, or gates one."""


class GenericEmbedding(ReadableWeight, VocabParallelEmbedding):
    """An embedding of transformers'."""


class TransposedLinear(GenericLinear):
    """A linear layer whose weight the checkpoint stores with inputs before outputs, as GPT-2 does."""

    transposed: ClassVar[bool] = True


class ScaledEmbedding(GenericEmbedding):
    """An embedding whose rows are multiplied by `embed_scale` as they are looked up."""

    embed_scale: float | Tensor

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids)
        scale = self.embed_scale
        return rows * (scale.to(rows) if isinstance(scale, Tensor) else scale)


class Head(ReadableWeight, ParallelLMHead):
    """The head, as transformers' forward calls it."""

    def forward(self, x: Tensor, gather_all: bool = True) -> Tensor:  # type: ignore[override]
        logits = super().forward(x, gather_all=gather_all)
        assert logits is not None
        return logits


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of the one of this name."""
    parent, _, last = name.rpartition(".")
    model.get_submodule(parent)._modules[last] = new


def is_plain_linear(module: Any) -> bool:
    """Tell whether a module computes what torch's linear layer does: by its forward, or as a trial shows."""
    if not isinstance(module, nn.Linear):
        return False
    return type(module).forward is nn.Linear.forward or _is_linear_by_trial(module)


@on_cpu
def _is_linear_by_trial(module: nn.Linear) -> bool:
    x, held = torch.randn(2, 5, 4), dict(module._parameters)
    small = {"weight": torch.randn(3, 4), "bias": None if module.bias is None else torch.randn(3)}
    if held.keys() != small.keys() or module._buffers or module._modules:
        return False
    try:
        module._parameters.update({n: t if t is None else nn.Parameter(t) for n, t in small.items()})
        found = module(x)
        expected = nn.functional.linear(x, small["weight"], small["bias"])
        return isinstance(found, Tensor) and torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    except Exception:
        return False
    finally:
        module._parameters.update(held)


def is_router(module: Any, name: str) -> bool:
    """Tell whether a linear layer chooses experts, or gates one."""
    return module.out_features == 1 or name.rpartition(".")[2] in ROUTERS


def make_linear(module: Any, name: str, quant_config: QuantizationConfig | None) -> Linear | None:
    """Make our layer for a linear layer of torch's or GPT-2's.  None: the module is neither."""
    options: dict[str, Any] = {"prefix": name, "quant_config": quant_config}
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return TransposedLinear(module.nx, module.nf, True, **options)
    if not is_plain_linear(module):
        return None
    bias = module.bias is not None
    kind = GenericRouter if is_router(module, name) else GenericLinear
    return kind(module.in_features, module.out_features, bias=bias, **options)


def make_head(
    module: Any,
    name: str,
    table: Any,
    quant_config: QuantizationConfig | None,
    fp32_logits: bool = True,
) -> Head | None:
    """Make our head for a linear layer of torch's.  None: the module is none.

    table: the embedding of ours that it is tied to, or None.
    """
    if not isinstance(module, nn.Linear):
        return None
    return Head(
        module.out_features,
        module.in_features,
        module.bias is not None,
        tied_to=table,
        fp32_logits=fp32_logits,
        prefix=name,
        quant_config=quant_config,
    )


def make_embedding(
    module: Any, name: str, quant_config: QuantizationConfig | None
) -> VocabParallelEmbedding | None:
    """Make our layer for an embedding of torch's, or one whose rows are scaled.  None: the module is neither."""
    if not isinstance(module, nn.Embedding):
        return None
    options: dict[str, Any] = {"prefix": name, "quant_config": quant_config}
    if type(module).forward is nn.Embedding.forward and module.max_norm is None:
        return GenericEmbedding(module.num_embeddings, module.embedding_dim, **options)
    scale = embedding_scale(module)
    if scale is None:
        return None
    made = ScaledEmbedding(module.num_embeddings, module.embedding_dim, **options)
    made.embed_scale = scale
    return made


@on_cpu
def embedding_scale(module: Any) -> float | Tensor | None:
    """Return what an embedding multiplies its rows by.  None: it does something else, as a trial shows."""
    scale = getattr(module, "embed_scale", None)
    if isinstance(scale, Tensor) and (scale.is_meta or scale.numel() != 1):
        return None
    if not isinstance(scale, (float, int, Tensor)):
        return None
    ids, table = torch.tensor([[2, 0], [1, 3]]), torch.randn(4, 3)
    weight, padding = module._parameters["weight"], module.padding_idx
    try:
        module._parameters["weight"], module.padding_idx = nn.Parameter(table), None
        same = torch.equal(module(ids), table[ids] * scale)
    except Exception:
        return None
    finally:
        module._parameters["weight"], module.padding_idx = weight, padding
    return scale if same else None
