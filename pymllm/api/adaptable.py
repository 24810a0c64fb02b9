"""The LoRA adapters of a loaded model: which there are, and which a request may have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pymllm.adapters import (
    LoadedAdapter,
    load_lora_weights,
    loaded_adapters,
    merge_lora_weights,
    unload_lora_weights,
    unmerge_lora_weights,
)
from pymllm.adapters.loading import merged_adapter
from pymllm.errors import RequestError, choices, nearest
from pymllm.loading.agreement import describe_adapter
from pymllm.models.language_model import LanguageModel
from pymllm.parallel.ranked import Ranked


class Adaptable(Ranked):
    """The base of what holds a model with adapters, alike on all its ranks.  model: the model."""

    model: LanguageModel

    @property
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        """The LoRA adapters that requests can choose, by name."""
        return loaded_adapters(self.model)

    def load_adapter(self, name: str, path: str | Path) -> LoadedAdapter:
        """Load a PEFT adapter for requests that name it, in place of one of that name; see `load_lora_weights`.

        name: what requests choose it by.  path: a folder as PEFT writes it, or a hub id.
        """
        with self._lock:
            loaded = load_lora_weights(self.model, path, name=name, activate=False)
            self._tell_ranks("load_adapter", name, str(path), files=lambda: describe_adapter(path))
            return loaded

    def unload_adapter(self, name: str) -> None:
        """Drop an adapter.  ConfigError if there is none of that name, or if it is merged."""
        with self._lock:
            unload_lora_weights(self.model, name)
            self._tell_ranks("unload_adapter", name)

    def merge_adapter(self, name: str) -> LoadedAdapter:
        """Give every request this adapter from now on, merged into the weights where these are plain floats.

        `unmerge_adapter` puts the weights back bit for bit; until then they are held twice, and no request can choose
        another adapter.
        """
        with self._lock:
            merged = merge_lora_weights(self.model, name)
            self._tell_ranks("merge_adapter", name)
            return merged

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`.  Where nothing is merged, do nothing."""
        with self._lock:
            unmerge_lora_weights(self.model)
            self._tell_ranks("unmerge_adapter")

    def check_adapter(self, name: str | None) -> str | None:
        """Return the name of an adapter that a request may have now.  RequestError, with the nearest names, if none."""
        if name is None:
            return None
        if not isinstance(name, str) or name not in self.adapters:
            raise RequestError(
                f"there is no adapter {name!r}",
                code="adapter-unknown",
                tensor="adapter",
                expected=choices(self.adapters, name) or "no adapter, as none is loaded",
                fix=nearest(str(name), self.adapters),
            )
        merged = merged_adapter(self.model)
        if merged not in (None, name):
            raise RequestError(
                f"the adapter {merged!r} is merged into the weights, so {name!r} cannot be chosen",
                code="adapter-merged",
                tensor="adapter",
                fix="Unmerge it first.",
            )
        return name
