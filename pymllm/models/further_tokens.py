"""Layers that predict further tokens (multi-token prediction), which checkpoints have beside those that run."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pymllm.config import ModelConfig

REASON = "a layer that predicts further tokens, which is not run"
LAYER = re.compile(r"(?:^|.*\.)layers\.(\d+)\.(.+)")
NAMED = re.compile(r"(?:^|\.)mtp[^.]*\.")
# What configs call the number of these layers.
COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")


class FurtherTokens:
    """The layers of a checkpoint that predict further tokens.

    They are called mtp; or they follow the layers that run, and have modules that none of these has (such as eh_proj).
    One that has none is a layer that the config does not count.
    """

    def __init__(self, tensors: Iterable[str], config: ModelConfig) -> None:
        self.first = config.size("num_hidden_layers")
        counts = [config.raw[name] for name in COUNTS if isinstance(config.raw.get(name), int)]
        modules: dict[int, set[str]] = {}
        for name in tensors:
            found = LAYER.fullmatch(name)
            if found is not None:
                modules.setdefault(int(found[1]), set()).add(found[2].rpartition(".")[0])
        usual = set().union(*(names for index, names in modules.items() if index < self.first))
        last = self.first + max(counts, default=1)
        self.layers = {i for i, names in modules.items() if self.first <= i < last and names - usual}

    def why_not_run(self, tensor: str) -> str | None:
        """Return why a tensor is of such a layer, or None: it is not."""
        found = LAYER.fullmatch(tensor)
        named = NAMED.search(tensor)
        if named is not None and (found is None or named.start() <= found.start(1)):
            return REASON
        return REASON if found is not None and int(found[1]) in self.layers else None
