"""The tokenizer of a checkpoint: text to ids and back, and its chat template."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pymllm.arguments import checked
from pymllm.disk import names_files
from pymllm.errors import CheckpointError, RequestError, counted
from pymllm.text.chat_template import ChatTemplate
from pymllm.text.encoders import AutoEncoder as AutoEncoder
from pymllm.text.encoders import Encoder, FastEncoder
from pymllm.text.encoders import auto_tokenizer_from_pretrained as auto_tokenizer_from_pretrained
from pymllm.text.json_files import read_json as read_json
from pymllm.text.template_files import choose_template, read_templates
from pymllm.text.text_bounds import most_characters
from pymllm.weights.hub import download_vocabularies

# Files that transformers makes a tokenizer of, where there is no tokenizer.json.
VOCABULARIES = ("tokenizer.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
# What stands for a space in sentencepiece's tokens.
SPACE = "\u2581"


def _letters_of_bytes() -> dict[str, int]:
    """Map the letters by which byte-level vocabularies spell bytes: those that print, themselves; others above 255."""
    prints = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in prints)
    return {chr(byte): byte for byte in prints} | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTES = _letters_of_bytes()


def _checked(text: str) -> str:
    """Return a text.  RequestError for a half of a surrogate pair, which is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            "a text has half of a surrogate pair, which is no character",
            code="text",
            tensor=f"character {error.start}",
            found=ascii(text[error.start]),
        ) from None
    return text


class Tokenizer:
    """A checkpoint's tokenizer.

    A checkpoint without one still runs on token ids; to encode text is then an error that says what is missing.
    """

    # The most tokens that a prompt may have; None: any number.
    longest_prompt: int | None = None

    @names_files
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        download_vocabularies(folder)
        self.settings = read_json(folder / "tokenizer_config.json")

    @functools.cached_property
    def encoder(self) -> Encoder:
        if os.path.lexists(self.folder / "tokenizer.json"):
            return FastEncoder.from_file(self.folder / "tokenizer.json")
        if any((self.folder / name).is_file() for name in (*VOCABULARIES, "tokenizer_config.json")):
            return AutoEncoder(self.folder)
        raise CheckpointError(
            "the checkpoint has no tokenizer",
            code="tokenizer-missing",
            file=str(self.folder),
            expected="tokenizer.json",
            fix="Pass token ids (--prompt-ids), another tokenizer (--tokenizer), or copy its files beside the weights.",
        )

    @property
    def available(self) -> bool:
        return any((self.folder / name).is_file() for name in ("tokenizer.json", *VOCABULARIES))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Encode a text to token ids, with the special tokens that the tokenizer itself adds."""
        return self.encoder.encode(_checked(text), add_special_tokens)

    def check_length(self, text: str, tensor: str = "prompt") -> None:
        """Refuse a prompt that is too long with a RequestError, where its length alone shows it; else do nothing."""
        longest = self.longest_prompt
        # No token stands for less than a character; the vocabulary is looked at for long texts only.
        if longest is None or len(text) <= longest:
            return
        bound, most = self.encoder.bound, most_characters(longest)
        if bound is None:
            too_long, tokens = len(text) > most, f"more than the {most} that are encoded for a prompt here"
        else:
            fewest = bound.fewest_tokens(text)
            too_long, tokens = fewest > longest, f"which are at least {counted(fewest, 'token')}"
        if too_long:
            raise RequestError(
                # Clients tell by these words that a prompt is too long.
                f"the prompt is too long: this model's maximum context length is {counted(longest, 'token')}",
                code="prompt-too-long",
                tensor=tensor,
                expected=f"at most {counted(longest, 'token')}",
                found=f"{len(text)} characters, {tokens}",
                fix="Shorten the prompt.",
            )

    def encode_cut(self, text: str, length: int) -> list[int]:
        """Encode a text with its special tokens to `length` ids at most, as transformers cuts texts."""
        return self.encoder.encode_cut(_checked(text), length, self.settings.get("truncation_side") == "left")

    def in_lower_case(self) -> Tokenizer:
        """Copy the tokenizer: the copy puts a text in lower case first, but for special tokens that stand in it."""
        made = copy.copy(self)
        made.encoder = self.encoder.in_lower_case()
        return made

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self.encoder.decode(ids, skip_special_tokens)

    def is_special(self, token: int) -> bool:
        """Tell whether a token is left out of decoded texts."""
        known: dict[int, bool] = self.__dict__.setdefault("_special", {})
        if token not in known:
            known[token] = not self.decode([token]) and self.decode([token], skip_special_tokens=False) != ""
        return known[token]

    def token_text(self, token: int) -> str:
        """Decode one token, with the space before it that some decoders leave out at the start of a text."""
        text = self.decode([token], skip_special_tokens=False)
        begins = (self.encoder.piece(token) or "").startswith(SPACE)
        return " " + text if begins and not text.startswith((" ", SPACE)) else text

    def token_bytes(self, token: int) -> bytes:
        """Return a token's bytes, which may be a part of a character."""
        text = self.token_text(token)
        piece = self.encoder.piece(token) or ""
        if "\ufffd" in text:
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes.fromhex(piece[3:5])
            if piece and all(letter in BYTES for letter in piece):
                return bytes(BYTES[letter] for letter in piece)
        return text.encode("utf-8")

    @property
    def mask_token(self) -> int | None:
        """The token that stands for what is not known yet; None: the tokenizer names none."""
        named = self.settings.get("mask_token")
        text = named.get("content") if isinstance(named, Mapping) else named
        if not isinstance(text, str) or not self.available:
            return None
        ids = self.encode(text, add_special_tokens=False)
        return ids[0] if len(ids) == 1 else None

    def spellings(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Encode each word as it begins a text, and as it comes after a space.  RequestError without a tokenizer."""
        if words and not self.available:
            raise RequestError(
                "bad_words needs a tokenizer, and the checkpoint has none",
                code="tokenizer-missing",
                tensor="bad_words",
                fix="Rule token ids out by logit_bias.",
            )
        texts = [text for word in words for text in (word.lstrip() or word, " " + word.lstrip())]
        spelled = (tuple(self.encode(text, add_special_tokens=False)) for text in texts)
        return tuple(dict.fromkeys(ids for ids in spelled if ids))

    @functools.cached_property
    def chat_templates(self) -> dict[str, ChatTemplate]:
        """The chat templates by name, `default` and `tool_use` say; {} if the checkpoint has none."""
        return read_templates(self.folder, self.settings)

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The template for chats without tools; None if the checkpoint has none."""
        return self.chat_templates.get("default")

    def use_chat_template(self, template: ChatTemplate) -> None:
        """Render all chats by a template in place of the checkpoint's own."""
        self.chat_templates = {"default": template}

    def template_for(self, tools: Any) -> ChatTemplate:
        """Choose the template for a chat, with tools or None.  ConfigError if there is none."""
        return choose_template(self.chat_templates, tools is not None, self.folder)

    @checked(kinds=False)
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """Encode a conversation, up to where the assistant answers.  ConfigError without a chat template.

        The arguments are those of `render_chat`.
        """
        text = self.render_chat(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )
        self.template_for(tools).check_reads_users()
        self.check_length(text, "messages")
        return self.encode(text, add_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Write a conversation as the checkpoint's template does.  ConfigError without a chat template.

        tools: what the model may call, each an object with `function`, as OpenAI's API has it.
        add_generation_prompt: whether the text ends with what begins the assistant's answer.
        continue_final_message: whether the last message is not closed: the model goes on with it. It excludes
        add_generation_prompt.
        variables: others that the template reads, as `enable_thinking`.
        """
        return self.template_for(tools).render(
            messages,
            self.special_tokens,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    @functools.cached_property
    def special_tokens(self) -> dict[str, str]:
        """The tokens that templates call by name, `eos_token` say."""
        named = {}
        # Older folders name them in a file of their own.
        for settings in (read_json(self.folder / "special_tokens_map.json"), self.settings):
            for name, token in settings.items():
                text = token.get("content") if isinstance(token, Mapping) else token
                if name.endswith("_token") and isinstance(text, str):
                    named[name] = text
        return named


# A character has at most four bytes, so that a token that comes later completes none of an earlier one. After so many
# tokens without a certain end, what they are is settled all the same.
CHARACTER_TOKENS = 4
MOST_UNSETTLED = 24


class TextStream:
    """A growing list of ids as pieces of text, none of which ends inside a character or a stop string.

    stop: strings that end the text.  min_tokens: of how many tokens the text has at least.
    begins: False: a space that the text begins with stays, which some decoders leave out at the start of a text.
    special: whether special tokens are a part of the text.  kept: those that are in any case.
    with_stop: whether a stop string is the end of the text; else it is left out.
    text: what is certain so far.  sent: how many of its characters pieces have had.
    stopped: whether a stop string has come.  stopped_by: which; None: none has.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        begins: bool = True,
        *,
        special: bool = False,
        kept: Sequence[int] = (),
        with_stop: bool = False,
    ) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.special, self.kept, self.with_stop = special, frozenset(kept), with_stop
        # Decoded with letters before it, and those are left out again, no text is at its start.
        self.ids = [] if begins else tokenizer.encode("a", add_special_tokens=False)
        self.min_tokens = min_tokens + len(self.ids)
        self.text = ""
        self.sent = 0
        self.stopped = False
        self.stopped_by: str | None = None
        # The text of ids before `_settled` is certain; decoding begins at `_prefix`, a little before.
        self._settled = len(self.ids)
        self._prefix = 0

    def push(self, token: int) -> str:
        """Add an id.  Returns the text that it adds for certain, which may be empty."""
        self.ids.append(token)
        if self.stopped:
            return ""
        # Decode from a little before the new ids, as a decoder may look back (for a leading space, say).
        known = self._decode(self.ids[self._prefix : self._settled])
        longer = self._decode(self.ids[self._prefix :])
        if len(longer) > len(known) and not longer.endswith("\ufffd"):
            self.text += longer[len(known) :]
            self._prefix, self._settled = self._settled, len(self.ids)
        elif len(self.ids) - self._settled >= MOST_UNSETTLED:
            self._settle(known, longer)
        return self._send(final=False)

    def _decode(self, ids: Sequence[int]) -> str:
        if not self.kept and not self.special:
            return self.tokenizer.decode(ids)
        if not self.special:
            ids = [token for token in ids if token in self.kept or not self.tokenizer.is_special(token)]
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _settle(self, known: str, longer: str) -> None:
        """Take the text of all but the last few ids for certain, or each push would decode all that are not again."""
        decode, ids, latest = self._decode, self.ids, len(self.ids) - CHARACTER_TOKENS
        # Best between two characters, where both sides decode alone to what they are together.
        cuts = range(latest, latest - CHARACTER_TOKENS, -1)
        whole = (cut for cut in cuts if decode(ids[self._prefix : cut]) + decode(ids[cut:]) == longer)
        cut = next(whole, latest)
        self.text += decode(ids[self._prefix : cut])[len(known) :]
        self._prefix, self._settled = cut - CHARACTER_TOKENS, cut

    def finish(self) -> str:
        """Return the text that was held back."""
        if not self.stopped:
            known = self._decode(self.ids[self._prefix : self._settled])
            self.text += self._decode(self.ids[self._prefix :])[len(known) :]
        return self._send(final=True)

    def _send(self, final: bool) -> str:
        # What could be the beginning of a stop string has not been sent.
        stops = self.stop if len(self.ids) >= self.min_tokens else ()
        for stop in stops:
            found = self.text.find(stop, self.sent)
            if found >= 0:
                end = found + len(stop) if self.with_stop else found
                self.text, self.stopped, self.stopped_by = self.text[:end], True, stop
        held = 0
        if not final and not self.stopped:
            held = max(
                (n for stop in stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])),
                default=0,
            )
        end = max(self.sent, len(self.text) - held)
        piece, self.sent = self.text[self.sent : end], end
        return piece
