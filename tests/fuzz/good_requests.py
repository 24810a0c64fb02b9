"""Good requests to every endpoint."""

from __future__ import annotations

from typing import Any

GREEDY = {"model": "shipped", "max_tokens": 3, "temperature": 0}
SAMPLING = {
    **{"n": 1, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 1, "stop": ["zz"], "logit_bias": {"5": 1.0}},
    **{
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "user": "u",
        "min_tokens": 0,
    },
    **{"ignore_eos": False, "stop_token_ids": [4095], "bad_words": ["qq"], "stream_options": None},
}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "def f(x):"}]},
    {"role": "assistant", "content": "x"},
    {"role": "user", "content": "go"},
]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
# Good requests by name: their path and body.
GOOD: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": (COMPLETIONS, {**GREEDY, "prompt": "def read(path):\n", "logprobs": 2, "echo": False}),
    "completion, all fields": (COMPLETIONS, {**GREEDY, **SAMPLING, "prompt": [5, 6, 7], "suffix": None}),
    "completions": (COMPLETIONS, {**GREEDY, "prompt": ["import os", "x"], "n": 2, "prompt_logprobs": 1}),
    "completion by schema": (COMPLETIONS, {**GREEDY, "prompt": "{", "guided_json": SCHEMA}),
    "completion by regex": (
        COMPLETIONS,
        {**GREEDY, "prompt": "x", "structured_outputs": {"regex": "[a-c]{2}"}},
    ),
    "chat": (CHAT, {**GREEDY, **SAMPLING, "messages": TALK, "logprobs": True, "top_logprobs": 1}),
    "chat with tools": (CHAT, {**GREEDY, "messages": TALK, "tools": TOOLS, "tool_choice": "auto"}),
    "chat by schema": (
        CHAT,
        {
            **GREEDY,
            "messages": TALK[1:2],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": SCHEMA, "strict": True},
            },
        },
    ),
    "responses": (
        RESPONSES,
        {
            **{"model": "shipped", "max_output_tokens": 3, "temperature": 0, "instructions": "Be brief."},
            "input": [
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "def f"}]},
                {"role": "assistant", "content": "x"},
                {"role": "user", "content": "go"},
            ],
            **{
                "text": {"format": {"type": "text"}},
                "tool_choice": "auto",
                "metadata": {"a": "b"},
                "include": [],
            },
        },
    ),
    "responses count": (f"{RESPONSES}/input_tokens", {"model": "shipped", "input": "def f"}),
    "messages": (
        MESSAGES,
        {
            **{
                "model": "shipped",
                "max_tokens": 3,
                "temperature": 0,
                "system": [{"type": "text", "text": "Brief."}],
            },
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "def f"}]},
                {"role": "assistant", "content": "x"},
                {"role": "user", "content": "go"},
            ],
            **{"stop_sequences": ["zz"], "metadata": {"user_id": "u"}, "top_k": 1, "top_p": 1.0},
        },
    ),
    "messages count": (
        f"{MESSAGES}/count_tokens",
        {"model": "shipped", "messages": [{"role": "user", "content": "def f"}]},
    ),
    "embeddings": (
        "/v1/embeddings",
        {"model": "shipped", "input": ["def f", "x"], "encoding_format": "float"},
    ),
    "tokenize": ("/tokenize", {"model": "shipped", "prompt": "def f", "return_token_strs": True}),
    "tokenize a chat": ("/tokenize", {"messages": TALK, "add_generation_prompt": True}),
    "detokenize": ("/detokenize", {"model": "shipped", "tokens": [5, 6, 7]}),
}
STREAMS = tuple(name for name, (path, _) in GOOD.items() if path in (COMPLETIONS, CHAT, RESPONSES, MESSAGES))
