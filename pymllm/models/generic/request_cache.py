"""A request at a time: transformers' model over its own cache, for what cannot be run side by side."""

# T tokens of a step, H hidden size

from __future__ import annotations

import contextlib
import inspect
import logging
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pymllm.errors import PymllmError
from pymllm.layers.held import WeightHolder
from pymllm.layers.step import fetch_attn_metadata
from pymllm.models.generic.classes import on_cpu, takes
from pymllm.models.generic.probe import OnMeta, positions_of_ids, tensors_kept

logger = logging.getLogger("pymllm")

CACHES = ("past_key_values", "cache_params", "state")
TRIED = (64, 96)  # lengths of texts whose caches are measured
TRAINED = "original_max_position_embeddings"  # the length past which LongRoPE has other frequencies


class RequestCaches(WeightHolder):
    """The caches of requests, by slot.

    config: transformers', of the model.  token_bytes, fixed_bytes: what a request takes for each token, and besides.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.token_bytes, self.fixed_bytes = 0, 1
        self.requests: dict[int, Any] = {}
        # What a forward puts into its modules: the state of a request, of a class that has one there.
        self.in_modules: list[tuple[dict[str, Any], str, Any, Tensor]] = []

    @on_cpu
    def measure(self, base: nn.Module, dtype: torch.dtype) -> None:
        """Measure what a request takes, by runs of the model on the meta device; where it has none, guess.

        The guess is that of attention whose keys and values are as wide as the hidden states.
        """
        try:
            first, second = (self._measure_one(base, length) for length in TRIED)
        except Exception:
            layers, hidden = (getattr(self.config, name, 64) for name in ("num_hidden_layers", "hidden_size"))
            self.token_bytes = 2 * layers * hidden * dtype.itemsize
            return
        self.token_bytes = max(0, (second - first) // (TRIED[1] - TRIED[0]))
        self.fixed_bytes = max(1, first - self.token_bytes * TRIED[0])

    def _measure_one(self, base: nn.Module, length: int) -> int:
        ids = torch.zeros(length, dtype=torch.int64, device="meta")
        with torch.no_grad(), tensors_kept(base) as self.in_modules, OnMeta():
            _, (kept, _) = self._run_one(base, ids, torch.arange(length), None)
        layers = getattr(kept, "layers", None)
        found = [vars(layer) for layer in layers] if layers is not None else kept
        states = [state for *_, state in self.in_modules]
        return sum(leaf.nbytes for leaf in tree_leaves((found, states)) if isinstance(leaf, Tensor))

    @property
    def loads(self) -> bool:
        return False

    def cache_bytes_per_token(self) -> int:
        return self.token_bytes

    def state_bytes(self) -> int:
        return self.fixed_bytes

    def detach_states(self) -> None:
        """Forget all requests."""
        self.requests.clear()

    def free_state(self, slot: int) -> None:
        """Forget the request that had a slot."""
        self.requests.pop(slot, None)

    def run(self, base: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
        """Run the step's requests one after another.  ids, positions: [T].  Returns hidden states [T, H]."""
        step = fetch_attn_metadata()
        slots = None if step.state_slots is None else step.state_slots.tolist()
        rows = []
        for index, (start, stop, length) in enumerate(step.spans):
            slot = None if slots is None else slots[index]
            fresh = length == stop - start
            kept = None if slot is None or fresh else self.requests[slot]
            hidden, kept = self._run_one(base, ids[start:stop], positions[start:stop], kept)
            if slot is not None:
                self.requests[slot] = kept
            rows.append(hidden)
        return torch.cat(rows) if rows else ids.new_empty((0, self.config.hidden_size), dtype=torch.float32)

    def _run_one(self, base: nn.Module, ids: Tensor, positions: Tensor, kept: Any) -> tuple[Tensor, Any]:
        """Run the next tokens of one request.  kept: what the call before returned.  Returns hidden [T, H] too."""
        cache, states = kept or (None, [before for _, _, before, _ in self.in_modules])
        for (place, name, *_), state in zip(self.in_modules, states, strict=True):
            place[name] = state
        hidden, cache = self._run_cached(base, ids, positions, cache)
        return hidden, (cache, [place[name] for place, name, *_ in self.in_modules])

    def _run_cached(self, base: nn.Module, ids: Tensor, positions: Tensor, kept: Any) -> tuple[Tensor, Any]:
        """Run them over transformers' cache.  kept: it, after the call before.  Returns it after this one, too."""
        name = next((name for name in CACHES if takes(base, name)), None)
        if name is None or isinstance(kept, Tensor):  # all tokens are run again
            everything = ids if kept is None else torch.cat((kept, ids))
            count = torch.arange(len(everything), device=ids.device)
            return self._call(base, everything, count, {"use_cache": False})[0][-len(ids) :], everything
        if kept is not None:
            return self._call(base, ids, positions, {name: kept, "use_cache": True})
        try:
            kept = None if name == "state" else self._new_cache(base, name)
            return self._call(base, ids, positions, {name: kept, "use_cache": True})
        except PymllmError:
            raise
        except Exception as error:
            if ids.is_meta:
                raise  # a run that only measures
            # Some classes have a cache that does not fit their own model (BLT, xLSTM of some sizes). The request goes
            # on without one; what else went wrong happens again without a cache, and is raised.
            hidden, _ = self._call(base, ids, positions, {"use_cache": False})
            logger.warning("%s runs a request without its cache: %s", type(base).__name__, error)
            return hidden, ids

    def _new_cache(self, base: nn.Module, name: str) -> Any:
        """Make the cache of a new request.  None: the class makes one, of a class of its own."""
        from transformers import DynamicCache

        asked = str(inspect.signature(base.forward).parameters[name].annotation)
        if re.search(r"[A-Za-z]Cache\b", asked) and not re.search(
            r"\b(Dynamic|EncoderDecoder)Cache\b", asked
        ):
            return None
        cache = (
            DynamicCache(config=self.config) if hasattr(self.config, "num_hidden_layers") else DynamicCache()
        )
        layers = max((getattr(module, "layer_idx", None) or 0 for module in base.modules()), default=0) + 1
        # A config may count an encoder's layers; without one, layers come as they are asked for.
        return cache if len(cache.layers) >= layers else DynamicCache()

    def _call(
        self, base: nn.Module, ids: Tensor, positions: Tensor, memory: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        given = {"input_ids": ids[None], "return_dict": True, **memory}
        if not positions_of_ids(base):
            given["position_ids"] = positions[None]
        output = base(**{name: value for name, value in given.items() if takes(base, name)})
        kept = next((output[name] for name in CACHES if name in output), None)
        return output[0][0], next(iter(memory.values()), None) if kept is None else kept


@on_cpu
def find_restart(model: Any) -> int | None:
    """Find at which length the class's own generation drops a request's cache and reads all tokens again.

    Tried at the lengths that the config says were trained.  None: it never does.
    """
    from transformers import DynamicCache

    def kept(length: int) -> bool:
        cache, ids = DynamicCache(), torch.zeros((1, length), dtype=torch.int64, device="meta")
        cache.update(*torch.empty((2, 1, 1, length - 1, 1), device="meta"), 0)
        return (
            model.prepare_inputs_for_generation(ids, past_key_values=cache).get("past_key_values") is not None
        )

    ropes = getattr(model.config, "rope_parameters", None) or {}
    found = {rope.get(TRAINED) for rope in (ropes, *ropes.values()) if isinstance(rope, dict)}
    for length in sorted(
        n for n in {*found, getattr(model.config, TRAINED, None)} if type(n) is int and n > 1
    ):
        with contextlib.suppress(Exception):  # of a class that does not generate so
            if kept(length) and not kept(length + 1):
                return length + 1
    return None
