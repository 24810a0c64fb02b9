"""Thoughts told apart from what is said, in any pieces."""

from __future__ import annotations

import pytest

from pymllm.text.parts import Content, ContentReader, Reasoning
from pymllm.text.reasoning import GRANITE, GRANITE_TAGS, MISTRAL, THINK, ThoughtReader
from pymllm.text.tool_calls.harmony import Harmony
from pymllm.text.tool_calls.hermes import Hermes

CASES = [
    (THINK, False, "<think>\nHm. \n\nYes.\n</think>\n\nHello\n", "Hm. \n\nYes.", "Hello\n"),
    (THINK, False, "\n<think>a</think>b </think> <think>", "a", "b </think> <think>"),
    (THINK, False, "<think>\n\n</think>\n\nHello", "", "Hello"),
    (THINK, False, "Hello <think>no</think>", "", "Hello <think>no</think>"),
    (THINK, False, " <thin", "", " <thin"),
    (THINK, False, "<think>never ends </thi\n", "never ends </thi", ""),
    (THINK, True, "Hm.\n</think>\nHello", "Hm.", "Hello"),
    (THINK, True, "never ends", "never ends", ""),
    (MISTRAL, False, "[THINK]a [b][/THINK]c", "a [b]", "c"),
    (GRANITE, False, "Here is my thought process: a\nHere's my response: b", "a", "b"),
    (GRANITE, False, "Here it is", "", "Here it is"),
    (GRANITE_TAGS, False, "<think>a</think>\n<response>b</response>", "a", "b"),
    (GRANITE_TAGS, False, "<think>a</think><resp", "a", "<resp"),
]


def read(reader, pieces):
    parts = [part for piece in pieces for part in reader.read(piece, final=False)]
    parts += reader.read("", final=True)
    return tuple(
        "".join(part.text for part in parts if isinstance(part, kind)) for kind in (Reasoning, Content)
    )


@pytest.mark.parametrize(("family", "opened", "text", "thought", "content"), CASES)
def test_thoughts_are_told_apart_however_their_text_comes(family, opened, text, thought, content):
    cuts = [[text], list(text), *([text[:cut], text[cut:]] for cut in range(len(text)))]
    for pieces in cuts:
        found = read(ThoughtReader(family, ContentReader(), opened), pieces)
        assert found == (thought, content), pieces


def test_calls_are_read_after_thoughts_and_not_in_them():
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    reader = ThoughtReader(THINK, Hermes().reader(["f"], None), False)
    parts = reader.read(f"<think>{call}</think>{call}", final=True)
    assert parts[0] == Reasoning(call) and [type(part).__name__ for part in parts[1:]] == [
        "ToolCall",
        "Arguments",
    ]


def test_harmony_s_channels_are_thoughts_and_answers():
    text = "<|channel|>analysis<|message|>Hm. <b>\n<|end|><|start|>assistant<|channel|>final<|message|>Hello < you"
    for pieces in ([text], list(text), *([text[:cut], text[cut:]] for cut in range(len(text)))):
        assert read(Harmony().reader([], None), pieces) == ("Hm. <b>\n", "Hello < you"), pieces


@pytest.mark.parametrize(
    ("prompt", "continued", "opened", "closed"),
    [
        ("<|im_start|>assistant\n<think>\n", None, True, False),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", None, False, True),
        ("<|im_start|>assistant\n", None, False, False),
        ("...", "<think>so far", True, False),
        ("...", "<think>so far</think> and", False, False),
    ],
)
def test_a_prompt_may_end_inside_thoughts(prompt, continued, opened, closed):
    assert (THINK.opened_by(prompt, continued), THINK.closed_by(prompt)) == (opened, closed)
