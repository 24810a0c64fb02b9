"""Runs that end in the middle, as Ctrl+C or a killed process would end them."""

from __future__ import annotations

from typing import Any

import pytest


class Stop(BaseException):
    """The end of a run that a test stops."""


def stop_at(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Raise Stop at the `call`-th call of a function, counted from 1, and at every later one."""
    real, count = getattr(owner, name), 0

    def stop(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count >= call:
            raise Stop
        return real(*arguments, **options)

    patch.setattr(owner, name, stop)
