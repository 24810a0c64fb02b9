"""Write into the pages what their `console` blocks give now:  python -m tests.pages.write [PAGE ...]

Blocks that have "..." in them are left as they are: what stands for any text is chosen by hand.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pymllm

from .blocks import read_blocks
from .commands import read_shown, show_command
from .desk import lay_out
from .test_pages import PAGES


def main() -> None:
    pages = [Path(page).resolve() for page in sys.argv[1:]] or PAGES
    with tempfile.TemporaryDirectory() as folder:
        desk = lay_out(Path(folder), pymllm.LLM())
        for page in pages:
            text = page.read_text("utf-8")
            for block in read_blocks(page):
                if block.language != "console" or "..." in block.text:
                    continue
                shown: list[str] = []
                for one in read_shown(block.text):
                    shown += [f"$ {one.command}", *show_command(one.command, desk)[1]]
                text = text.replace(block.text, "\n".join(shown))
            page.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
