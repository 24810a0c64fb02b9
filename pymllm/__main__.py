"""`python -m pymllm`, and the `pymllm` command; torchrun starts it so."""

import sys


def main() -> int:
    """Run the command.  Returns its exit code, that of Ctrl+C also while the command line is imported."""
    try:
        from pymllm.cli import main as run
    except KeyboardInterrupt:
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
