"""What a kind of input is, and the ways to change good ones that all kinds share."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

# keeps: the change says nothing new, so that the answer is the same, or a refusal.  breaks: no reader may follow it: a
# refusal, or the same where nothing reads it.  means: a right file that says something else, whose answer may differ.
Meaning = Literal["keeps", "breaks", "means"]


@dataclass(frozen=True)
class Input:
    """A good thing that was changed.

    subject: which good thing of its kind.  files: what it consists of, by name.  changed: what was done, for a reader.
    """

    subject: str
    files: Mapping[str, bytes] = field(repr=False)
    changed: str
    meaning: Meaning = "breaks"

    def write(self, folder: Path) -> Path:
        """Write the files into `folder`, and return it."""
        for name, data in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return folder


class Kind(Protocol):
    """A kind of input: what the good ones are, how they are changed, and what is asked of them.

    A judge returns whether the answer is as the unchanged subject's, and lets what is raised pass: what that means is
    the harness's to say.
    """

    name: str

    def prepare(self, folder: Path) -> None:
        """Make the good things and their answers, once, before any child; `folder` is the kind's own."""

    def inputs(self) -> SearchStrategy[Input]:
        """Return what makes inputs."""

    def judge(self, given: Input, folder: Path) -> bool:
        """Use an input as a user would.  folder: empty, and its own."""


# --- changes of JSON -------------------------------------------------------------------------------------------------

DEEP = 100_000
# Values that are seldom right and sometimes nearly so: as text, since JSON has more than Python's writer emits.
NASTY = (
    *(
        "null",
        "true",
        "false",
        "0",
        "-1",
        "1",
        "2",
        "3",
        "7",
        "8.0",
        "1.5",
        "-0.0",
        "1e308",
        "1e400",
        "-1e308",
        "1e-320",
    ),
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        str(2**31),
        str(2**32),
        str(2**40),
        str(2**63),
        str(2**64),
        str(-(2**63)),
    ),
    *(
        "9" * 5000,
        '""',
        '"x"',
        '"0"',
        '"8"',
        '"true"',
        '"None"',
        "[]",
        "{}",
        "[null]",
        "[[]]",
        "[[1]]",
        '[""]',
        '{"":0}',
    ),
    *(
        '"../x"',
        '"/dev/zero"',
        '"\\u001b[31mred"',
        '"\\ud800"',
        '"\\u0000"',
        '"\\u202egnp"',
        '"a\\nb"',
        '"' + "a" * 5000 + '"',
    ),
    *(
        '"(a+)+$"',
        '"re:' + ".?" * 60 + 'Z"',
        '"re:("',
        '"**"',
        "[" * DEEP + "]" * DEEP,
        '{"a":' * 2000 + "1" + "}" * 2000,
    ),
)

Path_ = tuple[Any, ...]


def places(value: Any, here: Path_ = ()) -> Iterator[Path_]:
    """Yield the path of everything in a JSON value, itself first."""
    yield here
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*here, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*here, index))


class Raw(str):
    """Text that stands in JSON as it is."""


def dumped(value: Any) -> bytes:
    """Write JSON that may hold `Raw` text, and pairs with a key twice."""
    marks: dict[str, str] = {}

    def plain(item: Any) -> Any:
        if isinstance(item, Raw):
            mark = f"\x01{len(marks)}\x01"
            marks[json.dumps(mark)] = str(item)
            return mark
        if isinstance(item, dict):
            return {str(key): plain(inner) for key, inner in item.items()}
        return [plain(inner) for inner in item] if isinstance(item, list) else item

    text = json.dumps(plain(value))
    for mark, raw in marks.items():
        text = text.replace(mark, raw)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def changed_json(draw: Any, value: Any, nasty: tuple[str, ...] = NASTY) -> tuple[bytes, str]:
    """Change one place of a JSON value, or two.  Returns its text, and what was done."""
    value = copy.deepcopy(value)
    done = []
    twice: list[tuple[str, str]] = []
    for _ in range(draw(st.sampled_from((1, 1, 1, 2)))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            continue
        holder = value
        for step in path[:-1]:
            holder = holder[step]
        last, old = path[-1], holder[path[-1]]
        ways = ["replace", "replace", "replace", "delete", "wrap"]
        ways += ["rename", "twice", "unknown"] if isinstance(holder, dict) else ["repeat"]
        ways += ["near"] if isinstance(old, (int, float)) and not isinstance(old, bool) else []
        way = draw(st.sampled_from(ways))
        if way == "replace":
            new = draw(st.sampled_from(nasty))
            holder[last] = Raw(new)
        elif way == "near":
            holder[last] = old + draw(st.sampled_from((-1, 1, 0.5, -2 * old, old, 64)))
        elif way == "delete":
            del holder[last]
        elif way == "wrap":
            holder[last] = draw(st.sampled_from(([old], {"value": old}, str(old))))
        elif way == "rename":
            holder[draw(st.sampled_from((f"{last}x", f" {last}", str(last).upper(), f"_{last}", "")))] = (
                holder.pop(last)
            )
        elif way == "unknown":
            holder[f"{last}_{draw(st.sampled_from(('v2', 'scale', 'fn', 'dtype')))}"] = Raw(
                draw(st.sampled_from(nasty))
            )
        elif way == "repeat":
            holder.insert(int(last), old)
        elif way == "twice":
            twice.append((json.dumps(last), draw(st.sampled_from(nasty))))
        done.append(f"{way} {'.'.join(map(str, path))}" + (f" by {new[:40]}" if way == "replace" else ""))
    text = dumped(value)
    for key, other in twice:
        text = text.replace(f"{key}:".encode(), f"{key}: {other}, {key}:".encode("utf-8", "surrogatepass"), 1)
    return text, "; ".join(done) or "nothing"


# --- changes of bytes ------------------------------------------------------------------------------------------------


@st.composite
def changed_bytes(draw: Any, data: bytes, most: int = 4) -> tuple[bytes, str]:
    """Change a few bytes, cut, repeat or insert some.  Returns the new bytes, and what was done."""
    rng: random.Random = draw(st.randoms(use_true_random=False))
    new, done = bytearray(data), []
    for _ in range(draw(st.integers(1, most))):
        if not new:
            break
        at = rng.randrange(len(new))
        way = draw(st.sampled_from(("flip", "set", "cut", "drop", "repeat", "insert")))
        done.append(f"{way} {at}")
        if way == "flip":
            new[at] ^= 1 << rng.randrange(8)
        elif way == "set":
            new[at] = draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x5C)))
        elif way == "cut":
            del new[at:]
        elif way == "drop":
            del new[at : at + rng.choice((1, 4, 8, 64))]
        else:
            piece = (
                new[at : at + rng.choice((1, 8, 64))]
                if way == "repeat"
                else rng.randbytes(rng.choice((1, 4, 8)))
            )
            new[at:at] = piece
    return bytes(new), ", ".join(done)


def chosen(*ways: tuple[int, Callable[[], SearchStrategy[Input]]]) -> SearchStrategy[Input]:
    """Choose among ways to make inputs, each as often as its weight says."""
    return st.one_of([make() for weight, make in ways for _ in range(weight)])
