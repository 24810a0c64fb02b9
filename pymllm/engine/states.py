"""States of requests: what layers keep of a request in a fixed size, beside its keys and values, and copies of it.

A recurrence (gated delta net, Mamba, a short convolution) goes on from the state after the tokens before. A request has
one slot in every such layer from its admission to its end, and its state there is true for its first `computed` tokens;
tokens must not be run twice over the same state. So a state that a failed step has left is made anew from the first
token, and a step that is tried several times (tape.py) gets a copy put back before each.

Pages of others are of use only with the state at their end. Copies of some states are therefore remembered, each under
the key of the page that ends there (`prefixes.py`).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pymllm.layers.held import WeightHolder, weight_holders
from pymllm.parallel import Leader
from pymllm.weights.memory import is_out_of_memory

# The slot of rows that no request has: kernels keep nothing there.
NOBODY = -1

# How large the copies of a step's states may be, which a tape needs until it is trusted.
MAX_COPIED_BYTES = 1 << 30


class StatePool:
    """`count` slots in every layer of a model that keeps states; slot s of all layers belongs to one request.

    The layers have one slot more, the last: that is where a layer of plain operations writes for the slot `NOBODY`.
    most_remembered: how many states may be remembered; 0 where a layer cannot copy its own.
    leader: tells the ranks that follow this one what becomes of their states; None: there are none.
    """

    def __init__(
        self,
        layers: Sequence[WeightHolder],
        count: int,
        device: torch.device,
        most_remembered: int = 0,
        leader: Leader | None = None,
    ) -> None:
        self._leader = leader
        self.layers, self.count, self.device = list(layers), count, device
        self.bytes_each = sum(layer.state_bytes() for layer in layers)
        self.most_remembered = most_remembered if all(layer.copies_states for layer in layers) else 0
        for layer in layers:
            layer.attach_states(count + 1, device)
        # The lowest go first, as memory that was never written to is not committed yet.
        self._free = list(range(count))
        self._remembered: OrderedDict[bytes, list[Any]] = OrderedDict()  # the first is forgotten first

    @classmethod
    def of(
        cls,
        model: nn.Module,
        count: int,
        device: torch.device,
        most_remembered: int = 0,
        leader: Leader | None = None,
    ) -> StatePool | None:
        """Make the pool of a model, or return None if none of its layers keeps a state."""
        layers = [holder for _, holder in weight_holders(model) if holder.state_bytes()]
        return cls(layers, count, device, most_remembered, leader) if layers else None

    def _tell(self, how: str, key: bytes | None, slot: int | None) -> None:
        if self._leader is not None:
            name = None if key is None else key.hex()
            self._leader.send({"do": "state", "how": how, "key": name, "slot": slot})

    def repeat(self, how: str, key: str | None, slot: int | None) -> None:
        """Do what rank 0's pool has done, on a rank that follows it."""
        name, place = bytes.fromhex(key or ""), -1 if slot is None else slot
        if how == "release":
            for layer in self.layers:
                layer.free_state(place)
        elif how == "forget":
            self.forget(name)
        elif how == "recall":
            self.recall(name, place)
        else:
            self.remember(name, place)

    @property
    def available(self) -> int:
        """The number of free slots."""
        return len(self._free)

    @property
    def remembered(self) -> int:
        """The number of states that are remembered."""
        return len(self._remembered)

    def allocate(self) -> int:
        """Take a free slot; ask `available` first.  What it holds is of no meaning."""
        return heapq.heappop(self._free)

    def release(self, slot: int) -> None:
        """Give a slot back, and have the layers drop what they hold there."""
        heapq.heappush(self._free, slot)
        self._tell("release", None, slot)
        for layer in self.layers:
            layer.free_state(slot)

    def save(self, slots: Sequence[int]) -> list[Any]:
        """Copy the states in these slots.  Every layer must say that it can (`copies_states`)."""
        index = torch.tensor(slots, device=self.device)
        return [layer.save_states(index) for layer in self.layers]

    def restore(self, slots: Sequence[int], saved: list[Any]) -> None:
        """Put copies that `save` made into as many slots."""
        index = torch.tensor(slots, device=self.device)
        for layer, copies in zip(self.layers, saved, strict=True):
            layer.restore_states(index, copies)

    def remember(self, key: bytes, slot: int) -> None:
        """Remember the state in a slot, if there is memory, under the key of the page whose end it has reached."""
        self._tell("remember", key, slot)
        if key not in self._remembered and self.most_remembered:
            while len(self._remembered) >= self.most_remembered:
                self._remembered.popitem(last=False)
            try:
                self._remembered[key] = self.save([slot])
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
        elif key in self._remembered:
            self._remembered.move_to_end(key)

    def knows(self, key: bytes) -> bool:
        """Tell whether a state is remembered under this key."""
        return key in self._remembered

    def recall(self, key: bytes, slot: int) -> bool:
        """Put the state that is remembered under a key into a slot.

        Returns whether it is there; without memory for that, what the slot holds is of no meaning.
        """
        self._tell("recall", key, slot)
        self._remembered.move_to_end(key)
        try:
            self.restore([slot], self._remembered[key])
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def forget(self, key: bytes) -> None:
        """Forget the state under a key, if there is one."""
        self._tell("forget", key, None)
        self._remembered.pop(key, None)

    def close(self) -> None:
        """Take the states from the layers."""
        self._remembered.clear()
        for layer in self.layers:
            layer.detach_states()
