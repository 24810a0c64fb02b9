"""A chat from its first message to its last."""

from __future__ import annotations

import contextlib
import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pymllm.cli.chat.answering import Answer, Answerer, StopSignal
from pymllm.cli.chat.attachments import attach
from pymllm.cli.chat.commands import Leave, find_command
from pymllm.cli.chat.conversation import Conversation
from pymllm.cli.chat.reading import EmptyInterrupt, Reader, unquoted
from pymllm.cli.chat.screen import Screen, without_echo
from pymllm.cli.chat.settings import Settings
from pymllm.cli.output import readable_size
from pymllm.errors import PymllmError, RequestError
from pymllm.text.parts import Reasoning

if TYPE_CHECKING:
    from pymllm.api import LLM

TOO_LONG = "prompt-too-long"


class Talk:
    """A conversation with a model, and what the commands change of it.

    unanswered: the last message, if its answer was stopped before it began; it is in no history.
    failed: whether anything was refused.  stop: tells when Ctrl+C has asked for the end of what is done now.
    """

    def __init__(
        self,
        answerer: Answerer,
        conversation: Conversation,
        settings: Settings,
        reader: Reader,
        screen: Screen,
    ) -> None:
        self.answerer, self.conversation, self.settings = answerer, conversation, settings
        self.reader, self.screen = reader, screen
        self.unanswered: str | None = None
        self.failed = False
        self.stop: StopSignal | None = None

    @property
    def llm(self) -> LLM:
        return self.answerer.llm

    def run(self) -> None:
        """Read and answer until the input ends, or the user leaves."""
        while True:
            try:
                line = self.reader.read()
                # In a script, Ctrl+C ends the script.
                self.stop = StopSignal() if self.reader.interactive else None
                with self.stop or contextlib.nullcontext():
                    self._take(line)
            except (EOFError, Leave):
                return
            except EmptyInterrupt:
                self.screen.note("Ctrl+D or /exit leaves.")
            except KeyboardInterrupt:
                if not self.reader.interactive:
                    raise
            except PymllmError as error:
                self.failed = True
                self.screen.error(error)

    def _take(self, line: str) -> None:
        """Do what a line says: a command, a message, or nothing."""
        quoted = unquoted(line)
        if quoted is not None:
            if quoted.strip():
                self.ask(quoted)
            return
        command = find_command(line)
        if command is not None:
            command[0].run(self, command[1])
        elif line.strip():
            text, files = attach(line.strip())
            for file in files:
                self.screen.remark(f"Read: {file}")
            self.ask(text)

    def check(self, conversation: Conversation) -> None:
        """Have the template write a conversation with a next message.  RequestError where it refuses."""
        messages = conversation.for_model()
        if not conversation.messages or conversation.messages[-1]["role"] != "user":
            messages.append({"role": "user", "content": "x"})
        self.answerer.count(messages, self.settings.variables(self.answerer.dialect))

    def ask(self, text: str) -> None:
        """Answer a message; where that fails, the conversation is as it was."""
        message = {"role": "user", "content": text}
        answer = self._answer([*self.conversation.for_model(), message])
        if answer is None:
            self.unanswered = text
            return
        self.conversation.messages += [message, answer.message()]
        self.unanswered = None

    def retry(self) -> None:
        """Answer the last message anew; where that fails or is stopped at once, the old answer stays."""
        if self.unanswered is not None:
            self.ask(self.unanswered)
            return
        place = self.conversation.last_exchange()
        if place is None:
            raise RequestError("there is no message to answer", code="command", tensor="/retry")
        asked = Conversation(self.conversation.system, self.conversation.messages[: place + 1])
        answer = self._answer(asked.for_model())
        if answer is not None:
            self.conversation.messages = [*asked.messages, answer.message()]

    def _answer(self, messages: list[dict[str, str]]) -> Answer | None:
        """Answer messages on the screen.  Returns None if it was stopped before anything was said."""
        answer, settings, screen = Answer(), self.settings, self.screen
        variables = settings.variables(self.answerer.dialect)
        try:
            with without_echo():
                for part in self.answerer.answer(messages, settings.sampling, variables, answer, self.stop):
                    if not isinstance(part, Reasoning):
                        screen.answer(part.text)
                    elif settings.shows_thoughts:
                        screen.thought(part.text)
        except RequestError as error:
            if error.code != TOO_LONG:
                raise
            raise self._too_long(error, len(messages) > 1) from None
        finally:
            screen.end()
        nothing = answer.ended == "stopped" and not answer.said and not answer.thought
        for line in self._remarks(answer, nothing):
            screen.remark(line)
        if self.reader.interactive:
            screen.note("")
        return None if nothing else answer

    def _remarks(self, answer: Answer, nothing: bool) -> Iterator[str]:
        """Yield what is to be said of an answer."""
        if nothing:
            yield "(stopped before the answer began: the message is not kept; /retry sends it again)"
            return
        if answer.ended == "stop" and not answer.said and not answer.thought:
            yield "(the model says nothing)"
        if self.settings.stats:
            yield describe(answer)
        elif answer.ended == "stopped":
            yield "(stopped by you)"
        elif answer.ended == "length" and not answer.full:
            yield f"(ended by length after {answer.tokens} tokens; /set max_tokens changes that)"
        if answer.full:
            yield (
                f"(the context of {self.llm.engine.longest} tokens is full: /undo takes back the last exchange, "
                "/clear begins anew, /save keeps what was said)"
            )

    def _too_long(self, error: RequestError, more: bool) -> RequestError:
        what = "the conversation with this message" if more else "this message"
        can = "Free room with /undo or /clear, or send less." if more else "Send less."
        return RequestError(
            f"{what} is too long for the context of {self.llm.engine.longest} tokens",
            code=TOO_LONG,
            expected=error.expected,
            found=error.found,
            fix=f"The message was not sent, and nothing is lost. {can}",
        )

    def describe(self) -> Iterator[tuple[str, str]]:
        """Yield the lines of /show: a name and a text each."""
        llm, plan, dialect = self.llm, self.llm.plan, self.answerer.dialect
        yield "model", str(plan.model)
        yield "runs", f"{plan.what_runs} on {plan.device}, {plan.dtype} activations, compute {plan.compute}"
        layers = [layer for layer in plan.layers if layer.kind not in ("attention", "recurrence")]
        methods = Counter(layer.method_detail for layer in layers)
        kernels = Counter(f"{layer.kernel} ({layer.kind})" for layer in plan.layers)
        yield "weights", f"{readable_size(plan.totals['weight_bytes'])}: {_counts(methods)}"
        yield "kernels", _counts(kernels)
        yield "context", self._context()
        yield "cache", plan.describe_cache()
        yield "template", llm.tokenizer.template_for(None).file
        if self.answerer.adapter is not None:
            yield "adapter", self.answerer.adapter
        system = self.conversation.system
        yield "system", "none of yours" if system is None else textwrap.shorten(system, 400)
        yield "sampling", self._sampling()
        knows = (
            "" if dialect.thoughts is not None or dialect.writes_messages else " (the template knows none)"
        )
        yield "thinking", f"{self.settings.thinking}{knows}"
        yield "stats", "on" if self.settings.stats else "off"

    def _context(self) -> str:
        longest = self.llm.engine.longest
        try:
            messages = self.conversation.for_model()
            used = self.answerer.count(messages, {}) if messages else 0
        except PymllmError:
            return f"{longest} tokens"
        return f"{used} of {longest} tokens used, {len(self.conversation.messages)} messages"

    def _sampling(self) -> str:
        params = self.answerer.params(self.settings.sampling)
        parts = ["greedy" if params.temperature == 0 else f"temperature {params.temperature:g}"]
        neutral: dict[str, Any] = {
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": None,
            "max_tokens": None,
        }
        neutral |= {"confidence_threshold": None, "stop": ()}
        for name, usual in neutral.items():
            value = getattr(params, name)
            if value != usual:
                parts.append(f"{name} {value!r}" if name == "stop" else f"{name} {value:g}")
        return ", ".join(parts)


def _counts(counted: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counted.most_common())


def describe(answer: Answer) -> str:
    """Describe an answer in a line: its prompt, what of that was reused, its tokens and their speed, what ended it."""
    reused = f", {answer.cached_tokens} reused" if answer.cached_tokens else ""
    timed = answer.tokens > 1 and answer.seconds > 0
    speed = f" at {(answer.tokens - 1) / answer.seconds:.1f} tokens/s" if timed else ""
    by = {"length": "length", "stopped": "you"}.get(answer.ended)
    if answer.stopped_by is not None:
        by = f"the stop text {answer.stopped_by!r}"
    ended = "" if by is None else f"; {'stopped' if by == 'you' else 'ended'} by {by}"
    return f"({answer.prompt_tokens} prompt tokens{reused}; {answer.tokens} tokens{speed}{ended})"
