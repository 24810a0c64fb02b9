"""The C compiler by which Triton builds, once, what talks to the driver: it takes $CC, gcc or clang, and Python.h."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Compiler:
    """What Triton would compile with.  found: its name, or why there is none.  variable: a $CC to be set for it."""

    found: str
    variable: str | None = None
    missing: bool = False


def choose_compiler(work: Path | None = None) -> Compiler:
    """Find a C compiler as Triton does, then others that $CC can name.  work: a folder for a script that is one."""
    given = os.environ.get("CC")
    if given:
        return Compiler(f"$CC={given}")
    for name in ("gcc", "clang"):
        if shutil.which(name):
            return Compiler(name)
    other = next(
        (path for name in ("cc", "x86_64-linux-gnu-gcc", "tcc") if (path := shutil.which(name))), None
    )
    if other is not None:
        return Compiler(f"{other}, as $CC", other)
    if importlib.util.find_spec("ziglang") is not None:
        if work is None:
            return Compiler("ziglang")
        script = work / "cc"
        work.mkdir(parents=True, exist_ok=True)
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ziglang cc "$@"\n', encoding="utf-8")
        script.chmod(0o755)
        return Compiler("ziglang, by a script that is $CC", str(script))
    return Compiler(
        "none: Triton looks for $CC, gcc and clang; cc, tcc and ziglang are not here either", None, True
    )


def python_header() -> Path | None:
    """Find Python.h where Triton looks for it, or None."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    return header if header.exists() else None
