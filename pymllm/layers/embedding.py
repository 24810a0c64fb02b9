"""The vocabulary-parallel embedding and LM head, quantised or not."""

# T tokens, V vocabulary, H hidden size

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pymllm.config import Execution
from pymllm.kernels.registry import Operation
from pymllm.layers.held import HolderState, WeightHolder
from pymllm.layers.swapped import LayerState, repacked
from pymllm.layers.weighted import WeightedLayer
from pymllm.quantization.base import QuantizationConfig
from pymllm.quantization.binding import bind_shared, bound_weight
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.spec import Span, refuse_sizes


class VocabParallelEmbedding(WeightedLayer):
    """A table of `num_embeddings` rows, divided over ranks; the last shares are padded to the size of the first.

    Ids outside a rank's share contribute zero there, and the ranks' rows are summed.
    """

    kind: ClassVar[str] = "embedding"
    operation: ClassVar[Operation] = "embedding"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        quant_method: LinearMethodBase | None = None,
        *,
        prefix: str = "",
        quant_config: QuantizationConfig | None = None,
        params_dtype: torch.dtype | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(prefix, params_dtype)
        what = prefix or type(self).__name__
        refuse_sizes(what, num_embeddings=[num_embeddings], embedding_dim=[embedding_dim])
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self._setup(self.stored_names(), quant_method, quant_config, bias)
        share = self.shape.outputs[0]
        self.vocab_start_index, self.vocab_end_index = share.start, share.stop

    def stored_names(self) -> list[str]:
        """Return the checkpoint name of the table."""
        return [self.prefix]

    def shard(self, rank: int, size: int) -> tuple[Span, tuple[Span, ...]]:
        total = self.num_embeddings
        share = -(-total // size)
        start, stop = min(rank * share, total), min((rank + 1) * share, total)
        return Span.full(self.embedding_dim), (Span(start, stop, total, share - (stop - start)),)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up rows.  ids: any shape, 0..V-1.  Returns [*ids.shape, H]."""
        if self.tp_size == 1:
            rows = self.quant_method.embed(self, ids)
            return self.add_lora_rows(ids, rows) if self.adapters else rows
        mine = (ids >= self.vocab_start_index) & (ids < self.vocab_end_index)
        local = torch.where(mine, ids - self.vocab_start_index, 0)
        rows = self.quant_method.embed(self, local)
        if self.adapters:
            self.add_lora_rows(local, rows)
        # Not a product with `mine`: the row of another id may hold infinities.
        rows = torch.where(mine.unsqueeze(-1), rows, 0)
        return self.parallel.all_reduce(rows)


class ParallelLMHead(VocabParallelEmbedding):
    """The product of hidden states with the table, over the same division of the vocabulary.

    tied_to: the embedding whose table this head shares. The checkpoint then holds the table once, under the
    embedding's name; a head with a method of its own keeps its own copy, converted from the same tensor.
    fp32_logits: whether logits are float32, whatever the activations are.
    """

    kind: ClassVar[str] = "lm_head"
    operation: ClassVar[Operation] = "linear"
    tied_to: VocabParallelEmbedding | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bias: bool = False,
        quant_method: LinearMethodBase | None = None,
        *,
        tied_to: VocabParallelEmbedding | None = None,
        fp32_logits: bool = True,
        prefix: str = "",
        quant_config: QuantizationConfig | None = None,
        params_dtype: torch.dtype | None = None,
    ) -> None:
        # Not a child: the embedding has its own place in the model.
        object.__setattr__(self, "tied_to", tied_to)
        self.fp32_logits = fp32_logits
        super().__init__(
            num_embeddings,
            embedding_dim,
            quant_method,
            prefix=prefix,
            quant_config=quant_config,
            params_dtype=params_dtype,
            bias=bias,
        )

    def stored_names(self) -> list[str]:
        return [self.prefix if self.tied_to is None else self.tied_to.prefix]

    def _setup(self, *args: Any, **options: Any) -> None:
        super()._setup(*args, **options)
        self.shares_table = self.tied_to is not None and self.quant_method == self.tied_to.quant_method
        if self.shares_table:
            for name in [name for name in self._parameters if name != "bias"]:
                delattr(self, name)

    def names(self) -> tuple[str, ...]:
        """Return the name by which rules know the head, wherever its table is stored."""
        return (self.prefix,)

    def finish(self) -> None:
        """Pack what has been loaded; or bind the embedding's table, which is packed by then as it loads first."""
        if self.shares_table:
            self.pack_tied()
        else:
            super().finish()

    def swapped(
        self, methods: Sequence[LinearMethodBase], staged: Mapping[WeightHolder, HolderState]
    ) -> LayerState:
        """Make the state in another method.  A tied head shares the embedding's table if their methods are equal."""
        old, (method,) = LayerState.of(self), methods
        if self.tied_to is None:
            return super().swapped(methods, staged)
        embedding = staged[self.tied_to]
        assert isinstance(embedding, LayerState) and embedding.bound is not None
        shares = method == embedding.method
        if shares and not (old.shares_table and embedding.bound is bound_weight(self.tied_to)):
            assert self.execution is not None  # it was loaded
            bound = bind_shared(embedding.bound, self.execution, "linear")
        else:
            bound = repacked(self, old, method)
        return replace(old, method=method, bound=bound, shares_table=shares)

    def pack_tied(self) -> None:
        """Bind the embedding's packed table for this head's matmul.  The embedding must be packed."""
        assert self.tied_to is not None
        bound = bound_weight(self.tied_to)
        assert bound is not None
        execution = self.execution or Execution(dtype=self.params_dtype, device=bound.problem.device.spec)
        self.bound = bind_shared(bound, execution, "linear")

    def _table(self) -> VocabParallelEmbedding:
        """Return the layer that has the table: the embedding, where the head shares it and neither is packed."""
        if not self.shares_table or bound_weight(self) is not None:
            return self
        assert self.tied_to is not None
        if bound_weight(self.tied_to) is None:
            return self.tied_to
        self.pack_tied()
        return self

    def forward(self, x: Tensor, gather_all: bool = False) -> Tensor | None:  # type: ignore[override]
        """Compute logits of x [*, H].  Returns [*, V] on rank 0 and None elsewhere; gather_all: on every rank."""
        logits = self.quant_method.logits(self._table(), x, self.bias)
        if self.adapters:
            self.add_lora(x, logits)
        if self.fp32_logits:
            logits = logits.float()
        gathered = self.parallel.all_gather(logits) if gather_all else self.parallel.gather(logits)
        return None if gathered is None else gathered[..., : self.num_embeddings]
