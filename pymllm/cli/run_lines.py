"""The batches of `pymllm run`: each line of a file a question, each answer a line, in the order of the questions.

Answers that are there are kept in a journal beside the output until all are; the output then appears whole. The journal
begins with what it belongs to, so that other questions, or another model, never get its answers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pymllm.cli.output import say
from pymllm.cli.questions import STDIN, Asker, Question, Ready, check_text, load, read_stdin
from pymllm.cli.sampling_options import SAMPLING
from pymllm.disk import write_whole, writing

if TYPE_CHECKING:
    from pymllm.engine.request import RequestOutput
    from pymllm.errors import PymllmError
    from pymllm.loading.prepare import Prepared
    from pymllm.planning.plan import Plan
    from pymllm.text.tokenizer import Tokenizer

JOURNAL = ".partial"
PROMPTS = ("prompt", "messages")
# Those settings of an answer that a line may have of its own.
LINE_SETTINGS = (*SAMPLING, "min_tokens", "presence_penalty", "frequency_penalty", "ignore_eos")


def run_lines(args: argparse.Namespace, model: str | None, prompt: str | None) -> int:
    """Answer the lines of --batch, or of a --prompt-file of JSON lines."""
    from pymllm.errors import ConfigError

    if prompt is not None:
        args.parser.error("a batch has its prompts: give no other")
    check_text(args, "")
    name = args.batch if args.batch is not None else args.prompt_file
    if args.tensor_parallel_size > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a batch runs on one rank only", code="batch-parallel", expected="--tensor-parallel-size 1"
        )
    raw = read_stdin(args) if name == STDIN else _read(Path(name))
    lines = list(read_lines(raw, name))
    ready: list[Ready] = []

    def check(prepared: Prepared, plan: Plan, tokenizer: Tokenizer) -> None:
        asker = Asker(args, model, prepared, plan, tokenizer)
        ready.extend(ask_lines(asker, lines, name))

    with Answers(None if args.output is None else Path(args.output)) as answers:
        llm = load(args, model, check)
        key = [str(llm.path), raw, args.adapter, [(one.ids, dataclasses.asdict(one.params)) for one in ready]]
        digest = hashlib.sha256(repr(key).encode("utf-8", "replace")).hexdigest()
        left = answers.open(digest, len(lines))
        adapter = args.adapter[0] if args.adapter else None
        asked = [ready[place] for place in left]
        try:
            for index, piece in llm.stream_all(
                [one.ids for one in asked], [one.params for one in asked], adapter=adapter
            ):
                if piece.output is not None:
                    answers.add(left[index], answer_of(lines[left[index]].id, piece.output))
        except KeyboardInterrupt:
            answers.interrupt()
            raise
        answers.finish()
    return 0


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a batch: its number, from 1; the id that its answer bears; and what it asks."""

    number: int
    id: str | int
    question: Question


def read_lines(raw: str, name: str) -> Iterator[Line]:
    """Read the lines of a batch; empty ones are left out.  RequestError for the first that cannot be read."""
    seen: dict[str | int, int] = {}
    for number, text in enumerate(raw.split("\n"), 1):
        if not text.strip():
            continue
        with _named(name, number):
            line = _read_line(number, text)
            if line.id in seen:
                raise _wrong(
                    "an earlier line has the same id",
                    f"an id that line {seen[line.id]} has not",
                    repr(line.id),
                )
        seen[line.id] = number
        yield line
    if not seen:
        with _named(name, 1):
            raise _wrong("the batch has no lines", 'lines such as {"prompt": "..."}', "none")


def _read_line(number: int, text: str) -> Line:
    from pymllm.errors import RequestError, nearest

    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(
            f"the line is no JSON: {error}", 'a text in quotes, or {"prompt": ...}', reprlib.repr(text)
        ) from None
    value = {"prompt": value} if isinstance(value, (str, list)) else value
    if not isinstance(value, dict):
        raise _wrong("the line asks nothing", 'a text in quotes, or {"prompt": ...}', reprlib.repr(value))
    named, identity = [name for name in PROMPTS if name in value], value.get("id", number)
    if len(named) != 1:
        raise _wrong("the line must have one prompt", " or ".join(PROMPTS), ", ".join(named) or "neither")
    if not isinstance(identity, (str, int)) or isinstance(identity, bool):
        raise _wrong("the id is neither a text nor a whole number", "a text", reprlib.repr(identity))
    content, settings = (
        value[named[0]],
        {key: given for key, given in value.items() if key not in ("id", *PROMPTS)},
    )
    unknown = next((key for key in settings if key not in LINE_SETTINGS), None)
    if unknown is not None:
        raise RequestError(
            f"a line has no setting {unknown!r}",
            code="parameter",
            expected=", ".join(("id", *PROMPTS, *LINE_SETTINGS)),
            fix=nearest(unknown, LINE_SETTINGS),
        )
    _check_content(named[0], content)
    if "stop" in settings:
        stop = settings["stop"]
        settings["stop"] = (
            (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop
        )
    return Line(number, identity, Question(content, settings))


def _check_content(name: str, content: Any) -> None:
    """Check the shape of a prompt: a text or token ids, or messages with a role and a content each."""
    if name == "messages":
        right = isinstance(content, list) and bool(content)
        right = right and all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in content)
        expected = 'a list of {"role": ..., "content": ...}'
    else:
        ids = isinstance(content, list) and all(type(one) is int for one in content)
        right, expected = isinstance(content, str) or ids, "a text, or a list of token ids"
    if not right:
        raise _wrong(f"the {name} cannot be asked", expected, reprlib.repr(content))
    for place, message in enumerate(content if name == "messages" else ()):
        _check_message(place, message)


def _check_message(place: int, message: dict[str, Any]) -> None:
    """Check the content of a message: a text, or parts of one.  An assistant's that calls tools may have none."""
    role, content = message["role"], message.get("content")
    calls = role == "assistant" and isinstance(message.get("tool_calls"), list) and message["tool_calls"]
    if not isinstance(content, (str, list)) and not (content is None and calls):
        raise _wrong(
            f"messages[{place}], of the role {role!r}, has no content",
            "a text" + (", or tool_calls and null" if role == "assistant" else ""),
            "null" if content is None else reprlib.repr(content),
        )


def _wrong(message: str, expected: str, found: str) -> PymllmError:
    from pymllm.errors import RequestError

    return RequestError(message, code="batch-line", expected=expected, found=found)


@contextlib.contextmanager
def _named(name: str, number: int) -> Iterator[None]:
    """Have an error of a line name it."""
    from pymllm.errors import PymllmError

    try:
        yield
    except PymllmError as error:
        error.file = f"{name}, line {number}"
        error.args = (str(error),)
        raise


def ask_lines(asker: Asker, lines: Sequence[Line], name: str) -> Iterator[Ready]:
    """Make every line ready, before weights are read."""
    for line in lines:
        with _named(name, line.number):
            yield asker.ask(line.question)


def answer_of(identity: str | int, output: RequestOutput) -> str:
    """Write a line of the output."""
    answer = {
        "id": identity,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(output.token_ids),
    }
    return json.dumps(answer, ensure_ascii=True) + "\n"


class Answers:
    """The answers of a batch, which come in any order and leave in that of the questions.

    file: the output, which appears whole, with a journal beside it until then; None: stdout, line by line.
    ConfigError for an output that is there already, or a journal of another batch.
    """

    def __init__(self, file: Path | None) -> None:
        from pymllm.errors import ConfigError

        self.file, self.count, self.shown = file, 0, 0
        self.done: dict[int, str] = {}
        self.journal: IO[str] | None = None
        if file is not None and os.path.lexists(file):
            raise ConfigError(
                "the output is there already",
                code="batch-output",
                file=str(file),
                fix="Choose another, or remove it.",
            )
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(
                "the folder of the output is not there",
                code="batch-output",
                file=str(file),
                fix="Make it first.",
            )

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        if self.journal is not None:
            self.journal.close()

    def open(self, digest: str, count: int) -> list[int]:
        """Begin, or go on with what a journal has.  Returns the places whose answers are still to come."""
        self.count = count
        if self.file is not None:
            path = self.file.with_name(self.file.name + JOURNAL)
            with writing(path):
                self.journal = open(path, "a+", encoding="utf-8")  # noqa: SIM115
                self._recover(path, digest)
            if self.done:
                say(f"(going on: {len(self.done)} of {count} answers are there)")
        return [place for place in range(count) if place not in self.done]

    def _recover(self, path: Path, digest: str) -> None:
        from pymllm.errors import ConfigError

        assert self.journal is not None
        self.journal.seek(0)
        head, *rest = self.journal.read().split("\n")
        if head and head != digest:
            raise ConfigError(
                "an interrupted batch had other questions, settings or another model",
                code="batch-output",
                file=str(path),
                fix="Run that command again, choose another output, or remove the file.",
            )
        for text in rest[:-1]:  # what has no line break was not written to its end
            place, _, answer = text.partition(" ")
            self.done[int(place)] = answer + "\n"
        self.journal.truncate(0)
        self.journal.write(
            digest + "\n" + "".join(f"{place} {answer}" for place, answer in self.done.items())
        )
        self.journal.flush()

    def add(self, place: int, answer: str) -> None:
        """Take the answer to a question."""
        self.done[place] = answer
        if self.journal is not None:
            with writing(Path(self.journal.name)):
                self.journal.write(f"{place} {answer}")
                self.journal.flush()
            return
        while self.shown in self.done:
            print(self.done[self.shown], end="", flush=True)
            self.shown += 1

    def interrupt(self) -> None:
        """Keep what is there: on stdout, answers whose turn has not come; in the journal all are."""
        if self.file is None:
            for place in sorted(place for place in self.done if place >= self.shown):
                print(self.done[place], end="", flush=True)
        kept = "" if self.file is None else f" in {self.file}{JOURNAL}; the same command goes on from there"
        say(f"Interrupted: {len(self.done)} of {self.count} answers are kept{kept}.")

    def finish(self) -> None:
        """Have the output appear."""
        if self.file is not None and self.journal is not None:
            write_whole(self.file, (self.done[place].encode() for place in range(self.count)))
            self.journal.close()
            Path(self.journal.name).unlink()
            say(f"{self.count} answers: {self.file}")


def _read(file: Path) -> str:
    from pymllm.errors import ConfigError

    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"the batch cannot be read: {why}", code="batch-input", file=str(file)) from None
