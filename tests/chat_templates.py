"""Lean chat templates in the wire forms of several families, and tokenizers that have them."""

from __future__ import annotations

import json
from pathlib import Path

from pymllm.api import shipped_model

CALLS = (
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}"
)
TOLD = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<tool_call></tool_call><|im_end|>\n{% endif %}"
)
THINKING = (
    TOLD + "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message.content }}" + CALLS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPENED = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content.split('</think>')[-1] }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<|call|>' + call.function.name + '\n' + call.function.arguments }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
LLAMA = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'Answer with {"name": NAME, "parameters": ARGUMENTS}, <|python_tag|> before it.<|im_end|>\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.tool_calls %}{% set call = message.tool_calls[0].function %}"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}'
    "{% else %}{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}[INST]{{ message.content }}[/INST]"
    "{% elif message.role == 'tool' %}"
    "{% if message.tool_call_id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    '[TOOL_RESULTS]{"content": {{ message.content | tojson }}, "call_id": "{{ message.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% elif message.tool_calls %}[TOOL_CALLS][{% for call in message.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    "{{ call.function | tojson }}{% endfor %}]</s>"
    "{% else %}{{ message.content }}</s>{% endif %}{% endfor %}"
)
MISTRAL_NAMED = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for message in messages %}[INST]{% if message.reasoning %}[THINK]{{ message.reasoning }}[/THINK]{% endif %}"
    "{{ message.content }}{% for call in message.tool_calls or [] %}[TOOL_CALLS]{{ call.function.name }}[ARGS]"
    "{{ call.function.arguments | tojson }}{% endfor %}[/INST]{% endfor %}"
)
HARMONY = (
    "{% if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for message in messages %}<|start|>{{ message.role }}"
    "{% if message.thinking %}<|channel|>analysis<|message|>{{ message.thinking }}<|end|><|start|>assistant{% endif %}"
    "{% if message.tool_calls %}{% set call = message.tool_calls[0].function %}"
    "<|channel|>commentary to=functions.{{ call.name }} <|constrain|>json<|message|>"
    "{{ call.arguments | tojson }}<|call|>"
    "{% elif message.role == 'assistant' %}<|channel|>final<|message|>{{ message.content }}<|end|>"
    "{% else %}<|message|>{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
GRANITE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}\n<|tool_call|><|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if thinking %}Write your thoughts after 'Here is my thought process:'.\n{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As some are: no system message, and roles in turn.
STRICT = (
    "{% for message in messages %}{% if message.role == 'system' or "
    "(message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{# tools #}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# By name: the template, and its marks that are special tokens.
FAMILIES = {
    "thinking": (THINKING, ()),
    "opened": (OPENED, ()),
    "llama": (LLAMA, ("<|python_tag|>",)),
    "mistral": (MISTRAL, ("[TOOL_CALLS]",)),
    "mistral_named": (MISTRAL_NAMED, ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]")),
    "harmony": (HARMONY, ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>")),
    "granite": (GRANITE, ("<|tool_call|>",)),
    "plain": (PLAIN, ()),
    "strict": (STRICT, ()),
    "xml_tools": (THINKING.replace("tools", "xml_tools"), ()),
    # It speaks of tools, and writes none.
    "silent": (PLAIN + "{% if tools %}{% endif %}{% if false %}<tool_call>{% endif %}", ()),
}


def write_tokenizer(folder: Path, name: str, *, in_place_of_padding: str = "") -> Path:
    """Write the shipped tokenizer with a template, and with its marks as special tokens after the others.

    in_place_of_padding: the one mark that is a special token, in place of one that the shipped model has.
    """
    template, special = FAMILIES[name]
    special = () if in_place_of_padding else special
    shipped = shipped_model()
    text = (shipped / "tokenizer.json").read_text(encoding="utf-8")
    described = json.loads(text.replace("<|pad|>", in_place_of_padding or "<|pad|>"))
    first = 4096
    described["added_tokens"] += [
        dict(described["added_tokens"][0], id=first + index, content=mark)
        for index, mark in enumerate(special)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    settings = json.loads((shipped / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
