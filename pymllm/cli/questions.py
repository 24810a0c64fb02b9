"""What `pymllm run` asks a model: where the prompt comes from, and how it becomes token ids before weights are read."""

from __future__ import annotations

import argparse
import os
import re
import select
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymllm.cli.options import engine_arguments, model_arguments, text_arguments
from pymllm.cli.output import rank, say
from pymllm.cli.sampling_options import sampling_arguments

if TYPE_CHECKING:
    from pymllm.api import LLM
    from pymllm.engine.sampling import SamplingParams
    from pymllm.loading.prepare import Prepared
    from pymllm.planning.plan import Plan
    from pymllm.text.tokenizer import Tokenizer

DEMO_PROMPT = 'class Queue:\n    """A first-in, first-out queue."""\n\n    def __init__(self):\n'
# org/name, org/name:TAG or org/name/FILE.gguf, as `weights/hub.py` reads them; not imported, for a quick --help.
HUB_ID = re.compile(
    r"(?i:(?:https://)?(?:hf|huggingface)\.co/)?[A-Za-z0-9][\w.-]*/[\w.-]+"
    r"(?::[\w.-]+(?:/[\w.-]+)*|/(?:[\w.-]+/)*[\w.-]+\.(?i:gguf))?"
)
STDIN = "-"
LINES = (".jsonl", ".ndjson")
# The most tokens of an answer by default: a raw text has no end of its own.
MOST_IN_CHAT, MOST_RAW = 1024, 128


@dataclass(frozen=True)
class Question:
    """A question to a model.

    content: a text, token ids, or messages.  settings: of sampling, of this question alone.
    """

    content: str | Sequence[int] | Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_messages(self) -> bool:
        return not isinstance(self.content, str) and any(isinstance(part, Mapping) for part in self.content)


@dataclass(frozen=True)
class Ready:
    """A question as the engine takes it.  chats: whether it went through the chat template."""

    ids: list[int]
    params: SamplingParams
    chats: bool


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for what is asked, and how."""
    group = parser.add_argument_group("the prompt")
    group.add_argument("-p", "--prompt", help="the prompt, whatever it looks like")
    group.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="a text that comes before PROMPT; - is stdin, .jsonl is as --batch",
    )
    group.add_argument(
        "--prompt-ids",
        metavar="IDS",
        help="token ids in place of a text: 1,2,3 or a JSON list; no tokenizer is needed",
    )
    group.add_argument("--batch", metavar="FILE", help="answer each line of a file of JSON lines; - is stdin")
    group.add_argument(
        "--output", metavar="FILE", help="where the answers of --batch go, as JSON lines; default: stdout"
    )
    group.add_argument("--system", metavar="TEXT", help="the system prompt of a chat")
    group.add_argument(
        "--thinking",
        choices=("on", "off"),
        help="whether the model thinks first, if its template has a switch",
    )
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a user's message: the default where the model has a chat template; else an error",
    )
    which.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without a chat template"
    )


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other, with the usage."""
    for name, given in (("--system", args.system), ("--thinking", args.thinking)):
        if given is not None and (args.raw or args.prompt_ids is not None):
            args.parser.error(f"{name} is a part of a chat: it goes with neither --raw nor --prompt-ids")
    if args.prompt_ids is not None and (args.chat or args.prompt is not None or args.prompt_file is not None):
        args.parser.error("--prompt-ids are the whole prompt: they go with no other prompt, and no --chat")
    lines = names_lines(args)
    if args.output is not None and not lines:
        args.parser.error("--output goes with --batch")
    if lines and (args.prompt_ids is not None or args.demo or args.stats or args.json):
        args.parser.error(
            "--batch goes with none of --prompt-ids, --demo, --stats, --json: its output is JSON lines"
        )
    if args.batch is not None and args.prompt_file is not None:
        args.parser.error("--batch has the prompts: it goes without --prompt-file")


def names_lines(args: argparse.Namespace) -> bool:
    """Tell whether the prompts are the lines of a file."""
    return args.batch is not None or (args.prompt_file or "").lower().endswith(LINES)


def read_words(args: argparse.Namespace) -> tuple[str | None, str | None]:
    """Read (model, prompt) from the positional words and --prompt; None: not given.

    CheckpointError for a MODEL that looks like a path, and is none.
    """
    words, prompt = args.words, args.prompt
    bare = prompt is not None or args.prompt_ids is not None or names_lines(args)
    if len(words) > (2 if prompt is None and args.prompt_ids is None else 1):
        args.parser.error(
            "expected at most MODEL and one PROMPT; put quotes around a prompt of several words"
        )
    if len(words) == 2:
        model, prompt = words
    elif len(words) == 1 and (bare or names_a_model(words[0])):
        model = words[0]
    else:
        model, prompt = None, words[0] if words else prompt
    if model is not None and HUB_ID.fullmatch(model) is None and not os.path.lexists(model):
        from pymllm.weights.opening import resolve_model_path

        resolve_model_path(model, args.revision)  # raises, with what is like it
    return model, prompt


def names_a_model(word: str) -> bool:
    """Decide whether a lone word is MODEL rather than PROMPT; `--help` states the rule."""
    path_like = word.startswith(("/", "./", "../", "~")) and not any(
        character.isspace() for character in word
    )
    return path_like or os.path.exists(word) or HUB_ID.fullmatch(word) is not None


def read_prompt(args: argparse.Namespace, model: str | None, prompt: str | None) -> str | list[int]:
    """Read what is asked: ids, or a text made of a file, or stdin, and the prompt, with an empty line between."""
    if args.prompt_ids is not None:
        return read_ids(args, args.prompt_ids)
    before = ""
    if args.prompt_file is not None and args.prompt_file != STDIN:
        before = read_file(args, Path(args.prompt_file))
    elif prompt is None or args.prompt_file == STDIN or (not args.demo and has_pipe()):
        before = read_stdin(args)
    if prompt is None:
        if not before and model is None and args.prompt_file is None:
            say("(no prompt given: this is the built-in one)")
            return DEMO_PROMPT
        if not before and not rank():
            args.parser.error("no prompt: give one after MODEL, with --prompt, or on stdin")
        return before
    return f"{before.rstrip()}\n\n{prompt}" if before.strip() else prompt


def read_ids(args: argparse.Namespace, text: str) -> list[int]:
    """Read token ids, "1,2,3" or "[1, 2, 3]"."""
    inside = text.strip()
    inside = inside[1:-1] if inside.startswith("[") and inside.endswith("]") else inside
    parts = [part for part in re.split(r"[,\s]+", inside.strip()) if part]
    bad = next((part for part in parts if not re.fullmatch(r"-?[0-9]{1,18}", part)), None)
    if bad is not None or not parts:
        args.parser.error(
            f"--prompt-ids must be whole numbers, 1,2,3 or [1, 2, 3]; found {text if bad is None else bad!r}"
        )
    return [int(part) for part in parts]


def read_file(args: argparse.Namespace, file: Path) -> str:
    """Read a file of text."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or f"it is not UTF-8: {error}"
        args.parser.error(f"{file}: the prompt cannot be read: {why}")
    return text


def has_pipe() -> bool:
    """Tell whether stdin is a pipe or a file that somebody has put there; a terminal or /dev/null is neither."""
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    if stat.S_ISFIFO(kind) and not select.select([sys.stdin], [], [], 1.0)[0]:
        say("(reading the rest of the prompt from stdin until it ends; `< /dev/null` has none)")
    return stat.S_ISFIFO(kind) or stat.S_ISREG(kind)


def read_stdin(args: argparse.Namespace) -> str:
    """Read a text from stdin; "" from a terminal, unless it is asked for."""
    if sys.stdin is None or (sys.stdin.isatty() and STDIN not in (args.prompt_file, args.batch)):
        return ""
    data = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        args.parser.error(f"the prompt on stdin is not UTF-8: {error}")
    return text


def check_text(args: argparse.Namespace, prompt: str | Sequence[int]) -> None:
    for text in (prompt if isinstance(prompt, str) else "", args.system or "", *(args.stop or ())):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            args.parser.error("the prompt, --system and --stop must be UTF-8")


def load(
    args: argparse.Namespace, model: str | None, check: Callable[[Prepared, Plan, Tokenizer], object]
) -> LLM:
    """Load the model.  check: is called before a tensor is read, with what is known then."""
    from pymllm.api import LLM

    return LLM(
        model,
        tensor_parallel_size=args.tensor_parallel_size,
        expert_parallel=args.expert_parallel,
        adapters=dict([args.adapter] if args.adapter else []),
        **model_arguments(args),
        **engine_arguments(args),
        check_memory=args.check_memory,
        **text_arguments(args),
        before_loading=check,
    )


class Asker:
    """The reader of questions to a model whose weights are not read yet.

    ConfigError for a model that generates no text, a chat without a template, or thoughts without a switch.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: str | None,
        prepared: Prepared,
        plan: Plan,
        tokenizer: Tokenizer,
    ) -> None:
        prepared.model.check_generates()
        self.args, self.prepared, self.tokenizer = args, prepared, tokenizer
        self.longest: int = plan.kv_cache["max_model_len"]
        self.vocabulary = prepared.config.size("vocab_size")
        self.chosen = sampling_arguments(args)
        self.chats = self._chats(model)
        self.variables = self._thinking()
        self.params({}, self.chats)  # what is wrong with the options is said of them

    def _chats(self, model: str | None) -> bool:
        """Decide whether a text is a user's message."""
        from pymllm.api import shipped_model

        args = self.args
        if args.raw or args.prompt_ids is not None:
            return False
        if args.chat or args.system is not None or args.thinking is not None:
            self.tokenizer.template_for(None)
            return True
        # The small model has a template, but completing code is what it can.
        shipped = model is None or os.path.realpath(model) == os.path.realpath(shipped_model())
        return self.tokenizer.chat_template is not None and (not shipped or args.chat_template is not None)

    def _thinking(self) -> dict[str, bool]:
        if self.args.thinking is None:
            return {}
        from pymllm.errors import ConfigError
        from pymllm.text.dialect import SWITCHES

        known = self.tokenizer.template_for(None).variables
        switch = next((name for name in SWITCHES if name in known), None)
        if switch is None:
            raise ConfigError(
                "this model's chat template has no switch for thoughts",
                code="thinking",
                expected=f"a template that reads {' or '.join(SWITCHES)}",
                fix="Leave --thinking out.",
            )
        return {switch: self.args.thinking == "on"}

    def params(self, settings: Mapping[str, Any], chats: bool) -> SamplingParams:
        """Make the sampling settings of a question: its own, else the options', else the checkpoint's."""
        from pymllm.api.texts import default_params

        most = MOST_IN_CHAT if chats else MOST_RAW
        return default_params(self.prepared, **{"max_tokens": most, **self.chosen, **settings})

    def ask(self, question: Question) -> Ready:
        """Make a question ready.

        RequestError for a prompt that does not fit the context, or has ids outside the vocabulary; CheckpointError for
        a tokenizer or template that is missing or broken.
        """
        from pymllm.api.texts import encode
        from pymllm.engine.asking import check_length

        content = question.content
        if question.has_messages or (self.chats and isinstance(content, str)):
            messages: list[Any] = (
                [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
            )
            if self.args.system is not None and not any(one.get("role") == "system" for one in messages):
                messages = [{"role": "system", "content": self.args.system}, *messages]
            ids, chats = self.tokenizer.apply_chat_template(messages, variables=self.variables), True
            ids = encode(self.tokenizer, ids, self.vocabulary)
        else:
            if isinstance(content, str):
                self.tokenizer.check_length(content)
            ids, chats = encode(self.tokenizer, content, self.vocabulary), False  # type: ignore[arg-type]
        if not ids:
            from pymllm.errors import RequestError

            raise RequestError("the prompt has no tokens", code="prompt-empty", tensor="prompt")
        check_length(len(ids), self.longest)
        return Ready(ids, self.params(question.settings, chats), chats)
