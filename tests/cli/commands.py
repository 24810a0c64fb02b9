"""Running the command, and what an error of it looks like."""

from __future__ import annotations

import os
import subprocess
import sys


def command(*arguments, **settings):
    """`python -m pymllm` in a process of its own."""
    environment = {**os.environ, **settings.pop("env", {})}
    words = [sys.executable, "-m", "pymllm", *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment, **settings)


def assert_one_error(code, captured, *needles):
    """Exit code 1, nothing on stdout, one paragraph on stderr."""
    assert code == 1
    assert captured.out == ""
    assert captured.err.startswith("error: ") and "Traceback" not in captured.err
    assert captured.err.count("error: ") == 1 and "\n\n" not in captured.err
    for needle in needles:
        assert needle in captured.err
