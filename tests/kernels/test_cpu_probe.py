"""The probe against what Linux itself says, forced kernel paths, and life without the extension."""

import ast
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pymllm.kernels.native import extension

from ..processes import python
from .integer_cases import needs_native

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc and /sys")
needs_x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="x86-64 names")

PATHS = ["avx512_vnni", "avx2_vnni", "avx2", "neon_dotprod", "portable"]
HIDE_NATIVE = "import sys; sys.modules['pymllm._native'] = None\n"
PRINT_PROBE = """
import dataclasses, json
from pymllm.kernels.native import extension
info = dataclasses.asdict(extension.probe())
info["features"] = sorted(info["features"])
info["reason"] = extension.native_missing_reason()
info["torch"] = "torch" in __import__("sys").modules
print(json.dumps(info))
"""


def run_probe(*, hide_native: bool = False, isa: str | None = None) -> subprocess.CompletedProcess:
    return python("-c", (HIDE_NATIVE if hide_native else "") + PRINT_PROBE, PYMLLM_CPU_ISA=isa)


def probed(**options) -> dict:
    result = run_probe(**options)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(params=["native", "fallback"])
def hide_native(request) -> bool:
    if request.param == "native" and not extension.native_available():
        pytest.skip(str(extension.native_missing_reason()))
    return request.param == "fallback"


def test_a_reason_is_given_exactly_when_the_extension_is_missing():
    assert (extension.native_missing_reason() is None) == extension.native_available()


@needs_native
@needs_linux
@needs_x86
def test_native_features_equal_the_flags_of_proc_cpuinfo():
    flags = next(
        line.partition(":")[2].split()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("flags")
    )
    # Asked of the extension, not of CpuInfo: a feature it forgot to ask about must fail here as well.
    from pymllm import _native

    features = _native.probe()["features"]
    assert {name: name in flags for name in features} == features
    assert {"avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "amx_tile"} <= set(features)


@needs_native
@needs_linux
def test_native_probe_and_fallback_agree():
    native, fallback = probed(), probed(hide_native=True)
    assert native["native"] and not fallback["native"]
    assert native["reason"] is None
    same = ["arch", "features", "runnable_paths", "best_path", "logical_cpus", "physical_cores"]
    same += ["transparent_huge_pages"]
    assert {name: native[name] for name in same} == {name: fallback[name] for name in same}
    if native["arch"] == "x86_64":
        assert (native["vendor"], native["brand"]) == (fallback["vendor"], fallback["brand"])
    for cache in ("l1d_bytes", "l2_bytes", "l3_bytes"):
        # Where sysfs is silent only the extension can know: it asks CPUID.
        assert fallback[cache] in (None, native[cache])


@needs_linux
def test_logical_cpus_follow_the_affinity_of_the_process(hide_native):
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += (HIDE_NATIVE if hide_native else "") + PRINT_PROBE
    info = json.loads(python("-c", code, check=True).stdout)
    assert info["logical_cpus"] == 1
    assert info["physical_cores"] in (1, None)


def test_the_probe_works_without_torch(hide_native):
    assert probed(hide_native=hide_native)["torch"] is False


def test_a_hidden_extension_says_what_it_costs_and_how_to_get_it():
    info = probed(hide_native=True)
    assert info["native"] is False
    assert info["logical_cpus"] >= 1
    assert info["runnable_paths"][-1] == "portable"
    for part in ("not built", "slower", "compiler", "install pymllm again"):
        assert part in info["reason"]


def test_the_best_runnable_path_is_taken(hide_native):
    info = probed(hide_native=hide_native)
    assert info["best_path"] == info["runnable_paths"][0]
    assert info["runnable_paths"] == [path for path in PATHS if path in info["runnable_paths"]]


def test_every_runnable_path_can_be_forced(hide_native):
    for path in probed(hide_native=hide_native)["runnable_paths"]:
        assert probed(hide_native=hide_native, isa=path)["best_path"] == path


def test_an_empty_switch_forces_nothing(hide_native):
    assert probed(hide_native=hide_native, isa="") == probed(hide_native=hide_native)


def test_an_unknown_path_is_refused_with_the_choices(hide_native):
    result = run_probe(hide_native=hide_native, isa="avx1024")
    assert result.returncode != 0
    choices = ", ".join(PATHS)
    expected = f"ValueError: PYMLLM_CPU_ISA=avx1024 is not a kernel path. Choose one of: {choices}."
    assert result.stderr.strip().splitlines()[-1] == expected


def test_a_path_that_the_cpu_lacks_is_refused_with_what_it_can_run(hide_native):
    runnable = probed(hide_native=hide_native)["runnable_paths"]
    for lacking in [path for path in PATHS if path not in runnable][-2:]:  # neon_dotprod on x86, AVX on ARM
        result = run_probe(hide_native=hide_native, isa=lacking)
        assert result.returncode != 0
        error = result.stderr.strip().splitlines()[-1]
        assert error.startswith(f"ValueError: PYMLLM_CPU_ISA={lacking}: this CPU lacks ")
        assert error.endswith(f"It can run: {', '.join(runnable)}.")


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ("", "portable"),
        ("sse4_2 avx2 fma", "portable"),
        ("avx2 fma f16c", "avx2"),
        ("avx2 fma f16c avx_vnni", "avx2_vnni"),
        ("avx2 fma f16c avx512f avx512bw avx512dq avx512vl", "avx2"),
        ("avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_vnni", "avx512_vnni"),
        ("neon", "portable"),
        ("neon dotprod", "neon_dotprod"),
    ],
)
def test_a_path_needs_all_its_features(features, expected):
    assert extension._choose_path(frozenset(features.split()), "") == expected


@needs_native
def test_the_extension_and_python_know_the_same_paths(monkeypatch):
    from pymllm import _native

    monkeypatch.setenv("PYMLLM_CPU_ISA", "?")
    with pytest.raises(ValueError, match="Choose one of: " + ", ".join(extension._PATHS)):
        _native.probe()


# An extension that is older than the Python code


def test_every_part_that_python_calls_is_looked_for():
    """Another list than NATIVE_PARTS would let a stale extension through, as an AttributeError in the first forward."""
    called = set()
    for file in Path(extension.__file__).parents[2].rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        called |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("native()", "_native")
        }
    assert (called | {"probe"}) - {"__file__"} == set(extension.NATIVE_PARTS)


STALE = """
import sys, types
stale = types.ModuleType("pymllm._native")
for part in ("probe", "isa_code", "integer_linear"):
    setattr(stale, part, lambda *arguments: 1 / 0)
sys.modules["pymllm._native"] = stale
"""


def test_a_stale_extension_is_named_and_never_called():
    info = json.loads(python("-c", STALE + PRINT_PROBE, check=True).stdout)
    assert info["native"] is False
    assert (
        "older than the Python code: they lack Tape, Watch, attention, causal_conv, copy_rows, "
        in info["reason"]
    )
    assert "probe" not in info["reason"] and "(in a clone: make native; else: pip install" in info["reason"]
