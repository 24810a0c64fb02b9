"""Files that a message names by @path: their text is put into the message.

The rule: `@` at the beginning of a word, or after an opening bracket or quote, begins a path, `@"..."` one with spaces.
If a file of that name is there, its text comes along. If none is, a word that looks like a path (it has a / or an
ending such as .txt) is an error, and any other is text, as is an `@` inside a word, in a mail address say. `\\@` is an
`@` that begins no path.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pymllm.errors import CheckpointError, ConfigError, nearest
from pymllm.weights.tensor_file import Descriptor

MAX_BYTES = 1 << 20
NAMED = re.compile(r"""(?<![^\s(\[{'"<])(?P<escape>\\)?@(?:"(?P<quoted>[^"\n]+)"|(?P<bare>[^\s"]+))""")
# What may follow a path in a sentence.
AFTER = ".,;:!?)]}>'\""
ENDING = re.compile(r"\.[A-Za-z][A-Za-z0-9_]{0,9}$")


def attach(message: str) -> tuple[str, list[Path]]:
    """Put the files that a message names by @path behind it.  Returns the message and the files.

    ConfigError for a file that is missing, too large or no text.
    """
    files: dict[Path, str] = {}

    def replace(found: re.Match[str]) -> str:
        if found["escape"]:
            return found[0][1:]
        name, after = _choose(found["quoted"], found["bare"])
        if name is None:
            return found[0]
        path = expanded(name)
        if path not in files:
            files[path] = read_text(path, MAX_BYTES)
        return f"{name}{after}"

    text = NAMED.sub(replace, message)
    parts = [text, *(_block(path, content) for path, content in files.items())]
    return "\n\n".join(part for part in parts if part), list(files)


def expanded(name: str) -> Path:
    """Make a path of what a user types, with the home folder for ~; a ~ of nobody stays."""
    return Path(os.path.expanduser(name))


def _choose(quoted: str | None, bare: str | None) -> tuple[str | None, str]:
    """Return the path that a word names, and the rest of the word; None: it is text."""
    if quoted is not None:
        return quoted, ""
    assert bare is not None
    short = bare.rstrip(AFTER)
    for name in (bare, short):
        if name and os.path.lexists(os.path.expanduser(name)):
            return name, bare[len(name) :]
    looks_like_path = "/" in short or os.sep in short or short.startswith("~") or ENDING.search(short)
    return (short, bare[len(short) :]) if looks_like_path else (None, "")


def _block(path: Path, content: str) -> str:
    """Write a file's text between fences that are longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`{3,}", content)), default=2)
    fence = "`" * (longest + 1)
    return f"{path}:\n{fence}\n{content}{'' if content.endswith(chr(10)) else chr(10)}{fence}"


def read_text(path: Path, most: int) -> str:
    """Read a file of text in UTF-8.  ConfigError where it is missing, not a regular file, too large, or no text."""
    try:
        file = Descriptor(path)
        size = file.identity[2]
        data = bytes(file.read(0, size)) if size <= most else b""
    except ValueError as error:
        if isinstance(error, CheckpointError) and error.code != "not-found":
            raise _refusal(path, f"the file cannot be read: {error.message}") from None
        raise _refusal(path, "there is no such file", fix=_hint(path)) from None
    if size > most:
        raise _refusal(path, "the file is too large", f"at most {most} bytes", f"{size} bytes")
    place = data.find(0)
    if place >= 0:
        raise _refusal(path, "the file is no text", "text in UTF-8", f"a byte 0 at {place}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at {error.start}"
        raise _refusal(path, "the file is no text", "text in UTF-8", found) from None


def _hint(path: Path) -> str:
    try:
        names = sorted(os.listdir(path.parent))[:10000]
    except (OSError, ValueError):
        names = []
    return f"{nearest(path.name, names)} Write \\@ for an @ that begins no path.".strip()


def _refusal(
    path: Path, problem: str, expected: str | None = None, found: str | None = None, fix: str | None = None
) -> ConfigError:
    return ConfigError(problem, code="attachment", file=str(path), expected=expected, found=found, fix=fix)
