"""The part of a rank that follows: the cache, the states and the forwards that rank 0 speaks of, and no scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pymllm.engine.engine import Engine
from pymllm.engine.runner import Runner
from pymllm.engine.runs import Run
from pymllm.errors import RankError, counted


class Follower:
    """A rank's model, and what it keeps of requests that only rank 0 knows.

    engine: None for a model that does not generate.
    """

    def __init__(self, runner: Runner, engine: Engine | None) -> None:
        self.runner, self.engine = runner, engine

    def obey(self, what: str, message: Mapping[str, Any], integers: np.ndarray[Any, Any]) -> None:
        """Do one thing that rank 0 does too.  what: the name of it."""
        getattr(self, f"_{what}")(message, integers)

    def _cache(self, message: Mapping[str, Any], integers: np.ndarray[Any, Any]) -> None:
        """Make the KV cache, as large as rank 0's."""
        assert self.engine is not None
        self.engine.cache_pages = message["pages"]
        if self.engine.cache.num_pages != message["pages"]:
            raise RankError(
                "this rank's KV cache is not as large as rank 0's",
                code="ranks-disagree",
                expected=f"{counted(message['pages'], 'page')}",
                found=str(self.engine.cache.num_pages),
                fix="Run the same version with the same options on every rank.",
            )

    def _states(self, message: Mapping[str, Any], integers: np.ndarray[Any, Any]) -> None:
        """Make room for the states of requests."""
        assert self.engine is not None
        self.engine.state_slots, self.engine.remembered_states = message["slots"], message["remembered"]
        self.engine.prefix_reuse = True
        self.runner.states = self.engine.states

    def _open(self, message: Mapping[str, Any], integers: np.ndarray[Any, Any]) -> None:
        """Make what the decoding strategy needs."""
        assert self.engine is not None
        self.engine.open_strategy()

    def _step(self, message: Mapping[str, Any], integers: np.ndarray[Any, Any]) -> None:
        """Run a step of requests."""
        assert self.engine is not None
        runner, cache = self.engine.runners[message["model"]]
        runner.run(Run.from_integers(integers, message["adapters"]), cache)

    def _state(self, message: Mapping[str, Any], integers: np.ndarray[Any, Any]) -> None:
        """Do with states what rank 0's pool does."""
        assert self.engine is not None and self.engine.states is not None
        self.engine.states.repeat(message["how"], message["key"], message["slot"])

    def _logits(self, message: Mapping[str, Any], integers: np.ndarray[Any, Any]) -> None:
        """Run a text without a cache."""
        self.runner.logits(integers.tolist(), message["adapter"])

    def _texts(self, message: Mapping[str, Any], integers: np.ndarray[Any, Any]) -> None:
        """Run texts for their hidden states."""
        bounds = np.cumsum(message["counts"])[:-1]
        self.runner.hidden_states([part.tolist() for part in np.split(integers, bounds)], message["adapter"])
