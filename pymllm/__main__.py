"""`python -m pymllm` is the `pymllm` command; torchrun starts it so."""

import sys

from pymllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
