"""What Tab completes: commands, their words, and paths after `@`, /save and /load."""

from __future__ import annotations

import re
from collections.abc import Iterable

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from pymllm.cli.chat.settings import THINKING
from pymllm.cli.sampling_options import SAMPLING

NAMED = re.compile(r"""(?:^|[\s(\[{'"<])@(?:"([^"\n]*)|([^\s"]*))$""")


class ChatCompleter(Completer):
    """The completer of a chat's lines."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Yield what the text before the cursor may become."""
        from pymllm.cli.chat.commands import COMMANDS

        text = document.text_before_cursor
        words = text.split(" ")
        if text.startswith("/") and len(words) == 1:
            return self._words(text, [f"/{name}" for name in COMMANDS])
        choices = {"/set": SAMPLING, "/thinking": THINKING, "/stats": ("on", "off")}.get(words[0])
        if choices is not None:
            return self._words(words[1], choices) if len(words) == 2 else []
        if words[0] in ("/save", "/load"):
            return self._path(text[len(words[0]) + 1 :], complete_event)
        named = NAMED.search(text)
        return [] if named is None else self._named(named[1] or named[2] or "", text, complete_event)

    def _named(self, begun: str, text: str, event: CompleteEvent) -> Iterable[Completion]:
        """Complete a path after @, in quotes where it has spaces."""
        quoted = text[: len(text) - len(begun)].endswith('"')
        for found in self._path(begun, event):
            whole = begun[: len(begun) + found.start_position] + found.text
            if " " in whole and not quoted:
                yield Completion(f'"{whole}', -len(begun), display=found.display)
            else:
                yield found

    def _path(self, begun: str, event: CompleteEvent) -> Iterable[Completion]:
        return self._paths.get_completions(Document(begun), event)

    @staticmethod
    def _words(begun: str, words: Iterable[str]) -> list[Completion]:
        return [Completion(word, -len(begun)) for word in words if word.startswith(begun)]
