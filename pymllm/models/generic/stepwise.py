"""One step of a class's model at a time, for calibration: a block runs alone, in the place where the class calls it.

The class's forward is run each time, with other functions in the place of its blocks: those before the step give what
they have given, and the step is stopped at, with all that the class calls it with.
"""

# T tokens, H hidden size

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.errors import ConfigError
from pymllm.models.generic.probe import run_arguments


class _Reached(Exception):
    def __init__(self, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.args, self.options = args, options


class Blocks:
    """The blocks of a class's model.  base: the module that calls them.  base_name: its name in the model.

    begun: whether one has been run.
    """

    def __init__(self, base: nn.Module, base_name: str) -> None:
        self.base, self.base_name = base, base_name
        lists = [n for n, m in base.named_children() if isinstance(m, nn.ModuleList)]
        self.pattern = re.compile(
            f"{re.escape(base_name + '.') if base_name else ''}(?:{'|'.join(map(re.escape, lists))})\\.\\d+(?=\\.|$)"
            if lists
            else "(?!)"
        )
        self.begun = False
        self.tuples = False  # whether a block returns its hidden states as the first of several

    def block_of(self, name: str) -> str | None:
        """Return the block that a module lies in, by name; None: it lies in none."""
        found = self.pattern.match(name)
        return found[0] if found else None

    def enter(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return what the first block is given, [T, H].  ids, positions: [T]."""
        reached = self._run(ids, positions, None, self._names()[:1])
        return _hidden_of(reached)[0]

    def run(self, name: str, ids: Tensor, positions: Tensor, hidden: Tensor) -> Tensor:
        """Run a block on hidden states [T, H].  Returns [T, H]."""
        reached = self._run(ids, positions, hidden, [name])
        args, options = reached.args, dict(reached.options)
        if args:
            args = (hidden[None], *args[1:])
        else:
            options["hidden_states"] = hidden[None]
        output = self._module(name)(*args, **options)
        self.begun, self.tuples = True, not isinstance(output, Tensor)
        return (output[0] if self.tuples else output)[0]

    def leave(self, ids: Tensor, positions: Tensor, hidden: Tensor) -> Tensor:
        """Run what stands behind the blocks.  hidden: [T, H], what they have given.  Returns [T, H], for the head."""
        return self._run(ids, positions, hidden, [])

    def _names(self) -> list[str]:
        prefix = f"{self.base_name}." if self.base_name else ""
        names = (prefix + name for name, _ in self.base.named_modules())
        return [name for name in names if self.pattern.fullmatch(name)]

    def _module(self, name: str) -> Any:
        return self.base.get_submodule(name.removeprefix(f"{self.base_name}.") if self.base_name else name)

    def _run(self, ids: Tensor, positions: Tensor, hidden: Tensor | None, stop_at: Sequence[str]) -> Any:
        """Run the class's forward up to a block, or to its end.  Returns where it was reached, or hidden states."""
        given = run_arguments(self.base, ids[None], positions[None])
        with self._replaced(hidden, stop_at):
            try:
                output = self.base(**given)
            except _Reached as reached:
                return reached
        if stop_at:
            raise self._refused(stop_at[0], "a block that is called once, in the order of its name")
        return output[0][0]

    @contextlib.contextmanager
    def _replaced(self, hidden: Tensor | None, stop_at: Sequence[str]) -> Iterator[None]:
        changed: list[dict[str, Any]] = []
        called: set[str] = set()

        def stand_in(name: str) -> Callable[..., Any]:
            def forward(*args: Any, **options: Any) -> Any:
                if name in stop_at:
                    raise _Reached(args, options)
                if hidden is None or name in called:
                    raise self._refused(name, "a block that is called once, after those before it")
                called.add(name)
                return (hidden[None],) if self.tuples else hidden[None]

            return forward

        for name in self._names():
            changed.append(vars(self._module(name)))
            changed[-1]["forward"] = stand_in(name)
        try:
            yield
        finally:
            for attributes in changed:
                del attributes["forward"]

    def _refused(self, name: str, expected: str) -> ConfigError:
        return ConfigError(
            "calibration cannot run through this model a block at a time",
            code="calibration",
            tensor=name,
            expected=expected,
            found=f"another order in {type(self.base).__name__}",
            fix="Quantise without --calibrate.",
        )


def _hidden_of(reached: _Reached) -> Tensor:
    hidden = reached.args[0] if reached.args else reached.options.get("hidden_states")
    if not isinstance(hidden, torch.Tensor):
        raise ConfigError(
            "calibration cannot run through this model a block at a time",
            code="calibration",
            expected="blocks that are called with hidden states first",
            found=f"a block that is called with {', '.join(reached.options) or 'nothing'}",
            fix="Quantise without --calibrate.",
        )
    return hidden
