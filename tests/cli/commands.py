"""What an error of the command looks like."""

from __future__ import annotations


def assert_one_error(code, captured, *needles):
    """Assert exit code 1, nothing on stdout, one paragraph on stderr."""
    assert code == 1
    assert captured.out == ""
    assert captured.err.startswith("error: ") and "Traceback" not in captured.err
    assert captured.err.count("error: ") == 1 and "\n\n" not in captured.err
    for needle in needles:
        assert needle in captured.err
