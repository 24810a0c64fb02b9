"""The code blocks of a Markdown page, and what a comment above one says of how it is tested.

The word after the fence says what a block is: `python`, `sh` (commands), `console` ("$ " before each command, and below
it what a terminal shows; "..." stands for any text, or, alone on a line, for any lines), `json`, `yaml`, `toml`, and
`text`, which nothing runs. Above a block may stand, unseen by readers:

    <!-- needs: ray -->                 a package without which the block is left out
    <!-- not run: two machines -->      why its commands are only parsed
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

LANGUAGES = ("python", "sh", "console", "json", "yaml", "toml", "text")


@dataclass(frozen=True)
class Block:
    """A block.  page: its file.  line: its first.  needs: a package.  not_run: why it is only parsed."""

    page: Path
    line: int
    language: str
    text: str
    needs: str | None = None
    not_run: str | None = None

    @property
    def where(self) -> str:
        """The file and line, as an editor opens it."""
        return f"{self.page.name}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    """Read a page's blocks in their order.  ValueError for a fence that is not closed."""
    lines, blocks, number = page.read_text("utf-8").split("\n"), [], 0
    while number < len(lines):
        fence = re.match(r"^( *)```(\w*)\s*$", lines[number])
        number += 1
        if fence is None:
            continue
        first, above = number, lines[max(number - 2, 0)]
        while number < len(lines) and lines[number].strip() != "```":
            number += 1
        if number == len(lines):
            raise ValueError(f"{page}:{first}: the block is not closed")
        text = "\n".join(line.removeprefix(fence[1]) for line in lines[first:number])
        needs = re.search(r"<!-- needs: (\S+) -->", above)
        not_run = re.search(r"<!-- not run: (.+) -->", above)
        blocks.append(Block(page, first + 1, fence[2], text, needs and needs[1], not_run and not_run[1]))
        number += 1
    return blocks
