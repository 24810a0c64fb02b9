"""Prompt lookup: what followed the last few tokens where the text had them before is drafted again.

It needs no second model and next to no time, and pays where an answer copies: from documents, code, earlier turns, or
from itself.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from pymllm.engine.request import Request
from pymllm.engine.strategies.speculation import Speculation

# How many of the latest places are compared, of those where the shortest tokens are the same.
MOST_PLACES = 16


class Lookup:
    """The places of a growing text, by the tokens before them.

    longest, shortest: how many tokens before two places must be the same, at most and at least.

    An index knows the latest place after each `shortest` tokens, and each place knows the one before it after the same
    tokens. It takes some 130 bytes a token, and a lookup compares MOST_PLACES places.
    """

    def __init__(self, longest: int, shortest: int) -> None:
        self.longest, self.shortest = longest, shortest
        self.text = array("q")
        self.found: list[int] = []  # what may follow the text
        self._latest: dict[tuple[int, ...], int] = {}
        self._before = array("q")  # of each place, -1 for none

    def follow(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Take in what the text has got since."""
        known = len(self.text)
        if known < len(prompt):
            self.text.extend(prompt[known:])
            known = len(prompt)
        self.text.extend(answer[known - len(prompt) :])
        # What follows is known for all places but the one after the last token.
        for place in range(len(self._before), len(self.text)):
            if place < self.shortest:
                self._before.append(-1)
                continue
            tokens = tuple(self.text[place - self.shortest : place])
            self._before.append(self._latest.get(tokens, -1))
            self._latest[tokens] = place

    def find(self, count: int) -> list[int]:
        """Return `count` tokens that may follow the text; none if its last `shortest` tokens are new to it.

        They are those after the place with the longest text before it that equals the end, the latest of several.
        """
        text = self.text
        if len(text) < self.shortest:
            return []
        place, best, most = self._latest.get(tuple(text[-self.shortest :]), -1), -1, 0
        for _ in range(MOST_PLACES):
            if place < 0 or most == self.longest:
                break
            same = self.shortest
            while same < min(self.longest, place) and text[place - same - 1] == text[-same - 1]:
                same += 1
            if same > most:
                best, most = place, same
            place = self._before[place]
        if best < 0:
            return []
        # What reaches beyond the end goes on with itself: a text that repeats two tokens will repeat them again.
        period = len(text) - best
        return [text[best + step % period] for step in range(count)]


class PromptLookup(Speculation):
    """The strategy; a request's own part is a `Lookup`.  longest, shortest: as there."""

    name = "prompt_lookup"

    def __init__(self, drafts: int, longest: int, shortest: int) -> None:
        super().__init__(drafts)
        self.longest, self.shortest = longest, shortest

    def begin(self, request: Request) -> None:
        super().begin(request)
        request.decoding.own = Lookup(self.longest, self.shortest)

    def promise(self, request: Request) -> int:
        lookup: Lookup = request.decoding.own
        lookup.follow(request.prompt, request.answer)
        lookup.found = lookup.find(self.drafts)
        return len(lookup.found)

    def propose(self, requests: Sequence[Request]) -> list[list[int]]:
        return [request.decoding.own.found for request in requests]
