"""The chat templates of a folder: one, or several by name, of which `tool_use` is for chats with tools."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pymllm.disk import names_files
from pymllm.errors import CheckpointError, ConfigError
from pymllm.text.chat_template import ChatTemplate
from pymllm.text.json_files import read_json
from pymllm.weights.links import check_link
from pymllm.weights.tensor_file import read_small_file

DEFAULT, WITH_TOOLS = "default", "tool_use"
MAX_BYTES = 16 << 20
FURTHER = "additional_chat_templates"


@names_files
def read_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, ChatTemplate]:
    """Read the templates by name, from files or else from tokenizer_config.json; {} if there are none.

    settings: tokenizer_config.json.  CheckpointError for what is no template.
    """
    own = folder / "chat_template.jinja"
    files = {DEFAULT: own} if os.path.lexists(own) else {}
    if (folder / FURTHER).is_dir():
        check_link(folder / FURTHER)
        files |= {file.stem: file for file in sorted((folder / FURTHER).glob("*.jinja"))}
    if files:
        return {name: _read(file) for name, file in files.items()}
    found = named_templates(settings.get("chat_template"), str(folder / "tokenizer_config.json"))
    # Where processors of several kinds of input had theirs.
    older = folder / "chat_template.json"
    return found or named_templates(read_json(older).get("chat_template"), str(older))


def named_templates(found: Any, file: str) -> dict[str, ChatTemplate]:
    """Read what stands as `chat_template` in a file: a text, or a list of named ones."""
    if not found:
        return {}
    listed = [{"name": DEFAULT, "template": found}] if isinstance(found, str) else found
    if isinstance(listed, Mapping):
        listed = [{"name": name, "template": text} for name, text in listed.items()]
    templates = {}
    for one in listed if isinstance(listed, list) else [None]:
        name, text = (one.get("name"), one.get("template")) if isinstance(one, Mapping) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise CheckpointError(
                "the chat template cannot be read",
                code="chat-template",
                file=file,
                tensor="chat_template",
                expected='a text, or a list of {"name": ..., "template": ...}',
                found=type(found).__name__ if one is None else type(one).__name__ + " in the list",
            )
        templates[name] = ChatTemplate(text, file)
    return templates


def choose_template(templates: Mapping[str, ChatTemplate], tools: bool, folder: Path) -> ChatTemplate:
    """Choose as transformers does: with tools `tool_use`, else `default`.  ConfigError where there is none."""
    if tools and WITH_TOOLS in templates:
        return templates[WITH_TOOLS]
    if DEFAULT in templates:
        return templates[DEFAULT]
    raise ConfigError(
        "the checkpoint has no chat template" + (" for chats without tools" if templates else ""),
        code="chat-template-missing",
        file=str(folder),
        expected="chat_template.jinja, or chat_template in tokenizer_config.json",
        found=f"templates named {', '.join(sorted(templates))}" if templates else None,
        fix="Give one with --chat-template, or use plain completions.",
    )


def _read(file: Path) -> ChatTemplate:
    raw = read_small_file(file, MAX_BYTES, "chat-template")
    try:
        return ChatTemplate(raw.decode("utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"the chat template cannot be read: {error}", code="chat-template", file=str(file)
        ) from None
