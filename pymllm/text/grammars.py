"""Grammars that answers must follow: a JSON schema, a regular expression, or a grammar in Lark's notation.

llguidance compiles them to automata over the tokenizer's tokens, in a process of its own first. Compiled ones are kept,
and each answer gets a copy; they are bounded in the size of their text, and in what llguidance spends on them.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pymllm.errors import ConfigError, RequestError, install_command
from pymllm.text.bounded import Program, Stopped, encoded
from pymllm.text.children.grammars import SPACE as SPACE
from pymllm.text.children.grammars import compile_grammar
from pymllm.text.tokenizer import AutoEncoder, FastEncoder, Tokenizer

MAX_GRAMMAR_LENGTH = 1 << 16  # characters
# What may be left out or come again, in expressions: the time to compile one grows with the square of their number.
REPETITION = re.compile(r"[*+?]|\{\d")
MAX_REPETITIONS = 4096
# Of a grammar in Lark's notation: llguidance follows a chain of them on the stack, which four thousand overflow. A
# colon after a quote is one of JSON.
DEFINITION = re.compile(r"[^\"\s]\s*:")
MAX_DEFINITIONS = 1024
# Expressions that a text must match at the same time: each further one doubles the work.
MAX_INTERSECTED = 10
# Strings and expressions; the closing sign may be missing, so that no part of a line is read more than twice.
STRING, EXPRESSION = r'"(?:\\.|[^"\\\n])*("?)', r"/(?:\\.|[^/\\\n])+(/?)"
SPELT = re.compile(f"{STRING}|{EXPRESSION}")
WITHIN = {'"': re.compile(EXPRESSION), "/": re.compile(STRING)}
# What a grammar says of a token, by its number, its name or a range.
TOKEN = re.compile(f'{STRING}|{EXPRESSION}|<[^<>\\s"]{{1,256}}>')
INLINE_SCHEMA = re.compile(r"%json\s*")
KEPT_GRAMMARS = 64
# What a process may take that compiles a grammar first.
MAX_SECONDS, CLOCK_SECONDS, MAX_MEMORY = 10.0, 60.0, 1 << 30

Kind = Literal["json_schema", "regex", "lark"]


@dataclass(frozen=True)
class Grammar:
    """The form that an answer must have.  text: the schema as JSON, the regular expression, or the grammar."""

    kind: Kind
    text: str

    @classmethod
    def of_schema(cls, schema: str | Mapping[str, Any] | bool) -> Grammar:
        """Make the grammar of a JSON schema.  RequestError for one that is no JSON object (or true)."""
        try:
            read = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(read, sort_keys=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise cls.error("json_schema", f"is not JSON: {error}") from None
        if read is True:
            text = "{}"
        elif not isinstance(read, Mapping):
            raise cls.error("json_schema", "must be an object")
        return cls("json_schema", text)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or len(self.text) > MAX_GRAMMAR_LENGTH:
            raise self.error(self.kind, f"must be text of at most {MAX_GRAMMAR_LENGTH} characters")
        if len(REPETITION.findall(self.text)) > MAX_REPETITIONS:
            raise self.error(self.kind, f"must have at most {MAX_REPETITIONS} of the signs * + ? {{")

        if self.kind == "lark" and len(DEFINITION.findall(self.text)) > MAX_DEFINITIONS:
            raise self.error(self.kind, f"must have at most {MAX_DEFINITIONS} definitions")
        if self.kind != "regex" and self._intersected() > MAX_INTERSECTED:
            raise self.error(
                self.kind, f"must have at most {MAX_INTERSECTED} expressions that hold for the same text"
            )

    def _intersected(self) -> int:
        """Count the expressions that the same text must match, where they are most."""
        if self.kind == "json_schema":
            try:
                return intersected(json.loads(self.text))
            except RecursionError:
                raise self.error(self.kind, "is nested too deeply") from None
        count = SPELT.sub(_leave_out, self.text).count("&")
        for place in INLINE_SCHEMA.finditer(self.text):
            try:
                schema, _ = json.JSONDecoder().raw_decode(self.text, place.end())
            except (ValueError, RecursionError):
                continue  # llguidance says what is wrong with it
            count = max(count, intersected(schema))
        return count

    @staticmethod
    def error(kind: str, problem: str) -> RequestError:
        """Make the error for a grammar; `problem` goes on from the name of its parameter."""
        name = "grammar" if kind == "lark" else kind
        return RequestError(f"{name} {problem}", code="grammar", tensor=name)


def _leave_out(found: re.Match[str]) -> str:
    """Return what remains of a string or an expression: nothing; or, if it is not closed, all but what is in it."""
    if found[1] or found[2]:
        return ""
    return found[0][0] + WITHIN[found[0][0]].sub(lambda inner: "" if inner[1] else inner[0], found[0][1:])


def intersected(schema: Any) -> int:
    """Count the patterns and formats of a JSON schema that may hold for the same text, where they are most.

    Schemas beside each other in `allOf`, and those on both sides of a `$ref`, hold together, their parts as well. What
    no pointer of the schema's own leads to counts as all of it.
    """
    known: dict[int, int] = {}

    def count(part: Any) -> int:
        if isinstance(part, list):
            return max((count(one) for one in part), default=0)
        if not isinstance(part, dict):
            return 0
        if id(part) not in known:
            known[id(part)] = 0  # a schema in itself adds nothing
            together = part.get("allOf")
            known[id(part)] = (
                sum(isinstance(part.get(name), str) for name in ("pattern", "format"))
                + sum(count(one) for one in (together if isinstance(together, list) else ()))
                + (count(find(part["$ref"])) if isinstance(part.get("$ref"), str) else 0)
                + max((count(value) for name, value in part.items() if name != "allOf"), default=0)
            )
        return known[id(part)]

    def find(reference: str) -> Any:
        found = schema
        for name in reference.removeprefix("#").split("/")[1:]:
            name = name.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                return everything
        return found if reference[:2] in ("#", "#/") else everything

    try:
        everything = {"allOf": [{"pattern": ""}] * json.dumps(schema).count('"pattern"')}
        return count(schema)
    except RecursionError:
        raise Grammar.error("json_schema", "is nested too deeply") from None


class Matcher:
    """The place of one answer in its grammar."""

    def __init__(self, automaton: Any, vocabulary: int, kind: Kind) -> None:
        self._automaton, self._vocabulary, self._kind = automaton, vocabulary, kind

    def allowed(self) -> Tensor:
        """Return which tokens may come next, [V] bool.  RequestError where the grammar became too complex."""
        bits = torch.frombuffer(bytearray(self._automaton.compute_bitmask()), dtype=torch.uint8)
        self._check()
        places = torch.arange(8, dtype=torch.uint8)
        return ((bits.unsqueeze(-1) >> places) & 1).flatten()[: self._vocabulary].bool()

    def accept(self, token: int) -> None:
        """Take a token that was allowed.  RequestError for another one."""
        self._automaton.consume_token(token)
        self._check()

    def look_ahead(self, tokens: Sequence[int]) -> list[Tensor]:
        """Follow tokens that may come, without taking them.

        Returns which tokens may come next, [V] bool each: now, and after each of the tokens up to the first that is not
        allowed, or after which nothing but the end may come. It is empty where the grammar became too complex.
        """
        ahead, masks = Matcher(self._automaton.deep_copy(), self._vocabulary, self._kind), []
        try:
            masks.append(ahead.allowed())
            for token in tokens:
                if token >= self._vocabulary or not masks[-1][token]:
                    break
                ahead.accept(token)
                if ahead.complete:
                    break
                masks.append(ahead.allowed())
        except RequestError:
            pass  # the answer may never come this way
        return masks

    @property
    def complete(self) -> bool:
        """True where nothing but the end may come."""
        return bool(self._automaton.is_stopped())

    def _check(self) -> None:
        if self._automaton.is_error():
            raise Grammar.error(self._kind, f"cannot be followed: {_first_line(self._automaton.get_error())}")


class GrammarCompiler:
    """The compiled grammars of one tokenizer.

    vocabulary: of the model.  ends: the tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: Iterable[int]) -> None:
        self.tokenizer, self.vocabulary, self.ends = tokenizer, vocabulary, sorted(ends)
        self._lock = threading.Lock()
        self._tokens: Any = None
        self._kept: OrderedDict[Grammar, Any] = OrderedDict()

    def start(self, grammar: Grammar) -> Matcher:
        """Begin an answer.  A grammar that is new is compiled, which may take a second; any thread may do it.

        RequestError for a grammar that cannot be compiled; ConfigError where the checkpoint's tokenizer, or this
        installation, has not what it needs.
        """
        with self._lock:
            automaton = self._kept.get(grammar)
            if automaton is not None:
                self._kept.move_to_end(grammar)
                return Matcher(automaton.deep_copy(), self.vocabulary, grammar.kind)
            tokens = self._tokens = self._tokens or self._read_tokens()
        automaton = self._compile(grammar, tokens)
        with self._lock:
            self._kept[grammar] = automaton
            while len(self._kept) > KEPT_GRAMMARS:
                self._kept.popitem(last=False)
        return Matcher(automaton.deep_copy(), self.vocabulary, grammar.kind)

    def _compile(self, grammar: Grammar, tokens: Any) -> Any:
        _llguidance()
        _try(grammar)
        try:
            automaton = compile_grammar(grammar.kind, grammar.text, tokens)
        except Exception as error:  # llguidance raises ValueError and its own panics
            raise Grammar.error(grammar.kind, f"cannot be compiled: {_first_line(str(error))}") from None
        if automaton.is_error():
            raise Grammar.error(grammar.kind, f"cannot be compiled: {_first_line(automaton.get_error())}")
        return automaton

    def _read_tokens(self) -> Any:
        """Describe the tokenizer to llguidance."""
        encoder = self.tokenizer.encoder
        fast = encoder.tokenizer if isinstance(encoder, (FastEncoder, AutoEncoder)) else None
        fast = getattr(fast, "backend_tokenizer", fast)
        if fast is None or not hasattr(fast, "to_str"):
            raise ConfigError(
                "answers cannot be held to a grammar with this tokenizer",
                code="grammar",
                expected="one that the tokenizers library reads, as tokenizer.json is",
                found=type(encoder).__name__,
            )
        described = json.loads(fast.to_str())
        described["truncation"] = described["padding"] = None
        # Tokens beyond the model's are cut off again.
        size = max(self.vocabulary, 1 + max(fast.get_vocab(True).values(), default=0))
        ends = [end for end in self.ends if end < self.vocabulary] or None
        try:
            return _llguidance().LLTokenizer(json.dumps(described), n_vocab=size, eos_token=ends)
        except Exception as error:
            raise ConfigError(
                "answers cannot be held to a grammar with this tokenizer",
                code="grammar",
                expected="one that llguidance reads",
                found=_first_line(str(error)),
            ) from None


COMPILER = Program("grammars", ("llguidance",), MAX_MEMORY, kept=1)


def _try(grammar: Grammar) -> None:
    """Compile a grammar in a process of its own: llguidance crashes on some.  RequestError for one that ended it.

    What that process only refuses is left to the real tokens, which it does not have.
    """
    text = TOKEN.sub(_any_token, grammar.text) if grammar.kind == "lark" else grammar.text
    try:
        with COMPILER.process() as process:
            reply = process.ask(
                encoded({"seconds": MAX_SECONDS, "kind": grammar.kind, "text": text}), CLOCK_SECONDS
            )
            if "limit" in reply:
                # What a process has taken of memory it may never give back.
                raise Stopped(reply["limit"])
    except Stopped as stopped:
        reply = {"failed": str(stopped)}
    if "failed" in reply:
        raise Grammar.error(grammar.kind, f"cannot be compiled: {_first_line(reply['failed'])}")


def _any_token(found: re.Match[str]) -> str:
    """Return what stands for a token where tokens are bytes; strings and expressions stay."""
    return "<[0]>" if found[0].startswith("<") else found[0]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ConfigError(
            "holding answers to a grammar needs the package llguidance, which is not installed",
            code="missing-package",
            fix=install_command("grammar"),
        ) from None
    return llguidance


def _first_line(text: str) -> str:
    if text.startswith("NoExtension"):
        return "no text follows it"
    return text.strip().splitlines()[0][:300] if text.strip() else "no reason is given"
