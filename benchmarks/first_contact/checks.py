"""The stage `checks`: kernels at real shapes against float64 (attention: against float32), in order of importance."""

from __future__ import annotations

from . import attention, experts, layers, linear
from .notes import Notes
from .place import Check, Place, Unit


def units(place: Place) -> list[Unit]:
    """List the units of all groups, the most important first."""
    found = [unit for module in (linear, attention, experts, layers) for unit in module.units(place)]
    return sorted(found, key=lambda unit: unit[0])


def run(notes: Notes) -> None:
    """Check every unit that is this process's: each of several takes every so-manieth one."""
    place, task = Place(notes.task.rehearse), notes.task
    found: list[tuple[str, Check]] = []
    for number, (_, group, checks) in enumerate(units(place)):
        if number % task.parts == task.part:
            try:
                found += [(group, check) for check in checks()]
            except Exception as problem:
                notes.wrong(f"{group}: making unit {number}", problem, group=group)
    notes.plan(len(found))
    for group, (name, check) in found:
        notes.run(f"{group} {name}", check, group=group)
