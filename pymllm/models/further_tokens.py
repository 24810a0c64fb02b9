"""Layers that predict further tokens (multi-token prediction), which checkpoints have beside those that run."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pymllm.config import ModelConfig
from pymllm.quantization.base import StoredTensor

REASON = "a layer that predicts further tokens, which is not run"
LAYER = re.compile(r"(?:^|.*\.)layers\.(\d+)\.(.+)")
NAMED = re.compile(r"(?:^|\.)mtp[^.]*\.")
# What configs call the number of these layers.
COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "mtp_num_layers")


class FurtherTokens:
    """The layers of a checkpoint that predict further tokens.

    They are called mtp; or they follow the layers that run, and have a module that none of these has, which joins a
    token's hidden state and its embedding [H, 2H] (eh_proj). One without is a layer that the config does not count.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], config: ModelConfig) -> None:
        self.first = config.size("num_hidden_layers")
        counts = [config.raw[name] for name in COUNTS if isinstance(config.raw.get(name), int)]
        last, width = self.first + max(counts, default=1), config.get("hidden_size")
        usual: set[str] = set()  # the children of the layers that run
        joining: dict[str, int] = {}  # children of others, each with its layer
        for name, tensor in tensors.items():
            found = LAYER.fullmatch(name)
            index, child = (int(found[1]), found[2].split(".")[0]) if found is not None else (-1, "")
            if 0 <= index < self.first:
                usual.add(child)
            elif self.first <= index < last and (
                child == "eh_proj" or tuple(tensor.shape) == (width, 2 * (width or 0))
            ):
                joining[name] = index
        self.layers = {i for name, i in joining.items() if name.split(f".{i}.")[1].split(".")[0] not in usual}

    def why_not_run(self, tensor: str) -> str | None:
        """Return why a tensor is of such a layer, or None: it is not."""
        found = LAYER.fullmatch(tensor)
        named = NAMED.search(tensor)
        if named is not None and (found is None or named.start() <= found.start(1)):
            return REASON
        return REASON if found is not None and int(found[1]) in self.layers else None
