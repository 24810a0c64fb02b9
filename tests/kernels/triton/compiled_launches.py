"""Launches of compiled kernels, bound and by Triton's own path, through a driver that keeps them.

`test_launch.py` runs this file in a process of its own: there the kernels are compiled, not interpreted.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pymllm.kernels.triton.launch import Kernel, inline, interpreting, kernel

from .fake_driver import FakeDriver, Launched, OnDevice, fake_driver

if TYPE_CHECKING:
    import triton.language as tl

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are compiled in a process of their own")


@inline
def doubled(value):
    return value + value


@inline
def halved(value):
    return value * 0.5


def probe(x, y, size, count, scale, flag, CHANGE: tl.constexpr, BLOCK: tl.constexpr, NAME: tl.constexpr):
    """Use every argument: x, y (may be None), two integers, a float and a truth value."""
    lanes = tl.arange(0, BLOCK)
    mask = lanes < count
    value = tl.load(x + lanes + tl.program_id(0), mask=mask, other=0.0).to(tl.float32)
    if NAME == "scaled":
        value = CHANGE(value) * scale
    if y is not None:
        value += tl.load(y + lanes * size, mask=mask, other=0.0).to(tl.float32)
    tl.store(x + lanes, tl.where(flag, value, 0.0).to(x.dtype.element_ty), mask=mask)


@pytest.fixture
def driver():
    with fake_driver() as made:
        yield made


def fresh() -> Kernel:
    """A kernel that has compiled nothing yet."""
    return kernel(varying=("count",))(probe)


MEMORY = torch.zeros(256, dtype=torch.float32)
PLACES = {
    "aligned": MEMORY[16:],
    "not aligned": MEMORY[1:],
    "float16": MEMORY.half(),
    "a parameter": torch.nn.Parameter(MEMORY.clone(), requires_grad=False),
    "on a device": OnDevice.of(MEMORY),
    "on a device, not aligned": OnDevice.of(MEMORY[1:]),
    "none": MEMORY[:0],
}
SIZES = (
    0,
    1,
    2,
    15,
    16,
    17,
    48,
    -1,
    -16,
    2**31 - 1,
    2**31,
    2**31 + 8,
    -(2**31),
    -(2**31) - 1,
    2**62,
    2**63 + 1,
)
BASE: dict[str, Any] = {
    "x": "aligned",
    "y": "aligned",
    "size": 3,
    "count": 7,
    "scale": 0.5,
    "flag": True,
    "CHANGE": doubled,
    "BLOCK": 16,
    "NAME": "scaled",
    "num_warps": 1,
    "num_stages": 1,
    "debug": False,
    "device": 0,
    "grid": (2, 3),
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "x": tuple(PLACES),
    "y": (*PLACES, None),
    "size": SIZES,
    "count": SIZES,
    "scale": (0.5, 1.0, float("inf"), 2, True),
    "flag": (True, False, 0.5),
    "CHANGE": (doubled, halved),
    "BLOCK": (16, 32),
    "NAME": ("scaled", "plain"),
    "num_warps": (1, 2),
    "num_stages": (1, 2),
    "debug": (False, True),
    "device": (0, 1),
    "grid": ((2, 3), (1,), (5, 1, 2)),
}


def one_change_each() -> list[dict[str, Any]]:
    return [BASE | {name: value} for name, values in CHOICES.items() for value in values]


def many_changes(count: int) -> list[dict[str, Any]]:
    draw = random.Random(7)
    few = draw.sample(one_change_each(), count)
    return [
        case | {name: draw.choice(CHOICES[name]) for name in draw.sample(("size", "count"), 1)}
        for case in few
    ]


def launch(probe: Kernel, driver: FakeDriver, case: dict[str, Any], bound: bool) -> Launched:
    """Launch one case, and return what the launcher was given."""
    from triton import knobs

    given = {**case}
    driver.device, grid = given.pop("device"), given.pop("grid")
    knobs.runtime.debug = given.pop("debug")
    arguments = [given.pop(name) for name in ("x", "y", "size", "count", "scale", "flag")]
    arguments[:2] = [place if place is None else PLACES[place] for place in arguments[:2]]
    before = len(driver.launches)
    try:
        if bound:
            probe.launch(grid, *arguments, **given)
        else:
            given["CHANGE"] = given["CHANGE"].compiled
            probe.compiled[grid](*arguments, **given)
    finally:
        knobs.runtime.debug = False
    (launched,) = driver.launches[before:]
    return launched


def seen(launched: Launched) -> tuple[Any, ...]:
    return launched.grid, launched.stream, launched.function, launched.metadata, launched.arguments


def test_a_launcher_is_given_by_bound_launches_what_triton_gives_it(driver, monkeypatch):
    """First in one order and then in another: what was bound for one case must not serve another."""
    probe, cases = fresh(), one_change_each() + many_changes(12)
    expected = [seen(launch(probe, driver, case, bound=False)) for case in cases]
    assert len({one[2] for one in expected}) > 20
    for order in (range(len(cases)), random.Random(3).sample(range(len(cases)), len(cases))):
        for index in order:
            assert seen(launch(probe, driver, cases[index], bound=True)) == expected[index], cases[index]
    forbid(monkeypatch)
    for index, case in enumerate(cases):
        assert seen(launch(probe, driver, case, bound=True)) == expected[index], case


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's own path fail: what is launched from now on is bound."""
    from triton.runtime import JITFunction

    def run(self: object, *arguments: object, **settings: object) -> None:
        raise AssertionError("Triton looked at the launch")

    monkeypatch.setattr(JITFunction, "run", run)


@pytest.mark.parametrize("backend, architecture", (("hip", "gfx942"),))
def test_on_other_gpus_too(backend, architecture, monkeypatch):
    """AMD's compiler also asks how much memory a tensor lies in: 2 GiB and more take other instructions."""
    with fake_driver(backend, architecture) as driver:
        probe, cases = fresh(), [BASE | {"x": name} for name in PLACES] + [BASE | {"size": n} for n in SIZES]
        vast = torch.empty(2**31 + 64, dtype=torch.uint8)
        monkeypatch.setitem(PLACES, "vast", vast[:1024].view(torch.float32))
        monkeypatch.setitem(PLACES, "on a device, vast", OnDevice.of(vast[:1024].view(torch.float32)))
        cases += [BASE | {"x": "vast"}, BASE | {"x": "on a device, vast"}]
        for case in 2 * cases:
            assert seen(launch(probe, driver, case, bound=True)) == seen(
                launch(probe, driver, case, bound=False)
            )
        functions = {seen(launch(probe, driver, case, bound=True))[2] for case in (BASE, cases[-1])}
        assert len(functions) == (2 if backend == "hip" else 1)


def test_one_binary_serves_all_values_of_what_varies(driver):
    probe = fresh()
    functions = {launch(probe, driver, BASE | {"count": n}, bound=True).function for n in range(1, 70)}
    assert len(functions) == 1
    functions = {launch(probe, driver, BASE | {"size": n}, bound=True).function for n in range(1, 70)}
    assert len(functions) == 3, "of what does not vary: 1, multiples of 16, others"


def test_hooks_see_every_launch_while_they_are_there(driver):
    from triton import knobs

    probe, names = fresh(), []
    launch(probe, driver, BASE, bound=True)

    def hook(metadata):
        names.append(metadata.get()["name"])

    def see(watchers):
        for watcher in watchers:
            if callable(watcher):
                watcher(launched.watchers[0])

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        launched = launch(probe, driver, BASE, bound=True)
        see(launched.watchers[1:])
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert names == ["probe"]
    assert launch(probe, driver, BASE, bound=True).watchers == (None, None, None)
    probe.compiled.add_pre_run_hook(lambda *arguments, **settings: names.append(arguments[2]))
    launch(probe, driver, BASE, bound=True)
    assert names == ["probe", BASE["size"]]


def test_another_driver_s_kernels_are_loaded_anew():
    probe = fresh()
    for _ in range(2):
        with fake_driver() as driver:
            probe.compiled.device_caches.clear()
            launch(probe, driver, BASE, bound=True)
            assert launch(probe, driver, BASE, bound=True).function == "probe 1"
            assert driver.utils.loaded == ["probe"]


def test_a_constant_that_equals_nothing_is_not_kept(driver):
    probe = fresh()
    for _ in range(3):
        launch(probe, driver, BASE | {"NAME": float("nan")}, bound=True)
    assert not probe.bound._kernels


def test_arguments_that_are_none_of_ours_go_triton_s_way(driver):
    probe = fresh()
    with pytest.raises(TypeError):
        launch(probe, driver, BASE | {"size": "three"}, bound=True)
    with pytest.raises(TypeError, match="missing"):
        probe.launch((1,), MEMORY, None, 3, 7, 0.5)
    assert not driver.launches


def test_tensors_without_data_are_launched_nowhere(driver):
    fresh().launch((1,), MEMORY.to("meta"), None, 3, 7, 0.5, True, CHANGE=doubled, BLOCK=16, NAME="plain")
    assert not driver.launches


def test_under_a_triton_whose_path_is_not_known_every_launch_is_triton_s(driver, monkeypatch):
    import triton

    monkeypatch.setattr(triton, "__version__", "3.99.0")
    probe = fresh()
    for _ in range(3):
        launch(probe, driver, BASE, bound=True)
    assert not probe.bound._kernels and len(driver.launches) == 3
