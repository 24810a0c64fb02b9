"""Python in a process of its own, as long as a busy machine takes.

No test proves anything by how fast a process ends: SECONDS only ends one that hangs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SECONDS = 600


def environment(**changes: str | None) -> Mapping[str, str]:
    """Return this process's variables with these changes, None removing one; what Python finds here, it finds there."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    variables = os.environ | {"PYTHONPATH": path} | changes
    return {name: value for name, value in variables.items() if value is not None}


def python(*arguments: Any, check: bool = False, **changes: str | None) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments, in `environment(**changes)`, and keep what it prints.

    check: it must exit with 0.
    """
    done = run([sys.executable, *map(str, arguments)], env=environment(**changes))
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def run(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a command, and keep what it prints."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "timeout": SECONDS}
    return subprocess.run(command, **(pipes | settings))
