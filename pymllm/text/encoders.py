"""The libraries that turn text into ids and back: `tokenizers` for tokenizer.json, transformers for all else."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from pymllm.errors import CheckpointError
from pymllm.text.bounded import readable
from pymllm.text.json_files import read_json
from pymllm.text.text_bounds import TextBound, bound_of
from pymllm.text.tokenizer_files import check_file
from pymllm.weights.links import check_link

Given = ParamSpec("Given")
Made = TypeVar("Made")

TEMPLATES = "additional_chat_templates"  # a folder that transformers looks into, too

# From so many characters on, texts are encoded as a batch of one: that lets other threads of Python go on meanwhile. It
# is no way for short texts, as the library then complains about processes that are forked later.
LONG_TEXT = 1 << 14
# How many of them at a time: a text of megabytes takes a hundred times its size.
LONG_TEXTS = 2
_long_texts = threading.BoundedSemaphore(LONG_TEXTS)

# A list of more ids than these is made in parts, between which other threads have their turn.
PART = 1 << 17


def _ids(found: Any) -> list[int]:
    """List the ids of what the library has encoded, which is cut into parts."""
    if len(found) <= PART:
        return found.ids
    found.truncate(PART)
    ids = found.ids
    for part in found.overflowing:
        ids += part.ids
    return ids


def panics_told(call: Callable[Given, Made]) -> Callable[Given, Made]:
    """Make a CheckpointError of what the library raises: a bare Exception, or a panic of its Rust, which is none."""

    @functools.wraps(call)
    def told(*given: Given.args, **named: Given.kwargs) -> Made:
        try:
            return call(*given, **named)
        except BaseException as error:
            if type(error) is not Exception and type(error).__name__ != "PanicException":
                raise
            raise CheckpointError(f"the tokenizer failed: {readable(str(error))}", code="tokenizer") from None

    return told


class Encoder(Protocol):
    """The two directions of a tokenizer: text to ids, ids to text."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def encode_cut(self, text: str, length: int, from_left: bool) -> list[int]:
        """Encode a text with its special tokens to `length` ids at most: what is too much of the text is left out.

        from_left: whether it is left out at the beginning, not at the end.
        """

    def in_lower_case(self) -> Encoder:
        """Copy the tokenizer: the copy puts a text in lower case first, but for special tokens that stand in it."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...

    def piece(self, token: int) -> str | None:
        """Return a token as the vocabulary spells it; None: there is none."""

    def vocabulary(self) -> dict[str, int]:
        """Return the id of every token, of those that were added too."""

    @property
    def bound(self) -> TextBound | None:
        """The bound on how much text a token may hold; None: no such bound is known."""


class FastEncoder:
    """A tokenizer of the `tokenizers` library, which reads tokenizer.json."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def from_file(cls, file: Path) -> FastEncoder:
        """Read a tokenizer.json.  CheckpointError for one that cannot be read, or that crashes its reader."""
        import tokenizers

        check_file(file)
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
            # Files of encoders cut and pad every text to the length that they were trained with.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return cls(tokenizer)
        except Exception as error:
            # tokenizers raises bare Exception for a damaged file.
            raise CheckpointError(
                f"the tokenizer cannot be read: {error}", code="tokenizer", file=str(file)
            ) from None

    @panics_told
    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        with _long_texts:
            return _ids(self.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0])

    @panics_told
    def encode_cut(self, text: str, length: int, from_left: bool) -> list[int]:
        if len(text) < LONG_TEXT:
            found = self.tokenizer.encode(text, add_special_tokens=False)
        else:
            with _long_texts:
                found = self.tokenizer.encode_batch([text], add_special_tokens=False)[0]
        room = max(length - self.tokenizer.num_special_tokens_to_add(False), 0)
        if len(found.ids) > room:
            found.truncate(room, direction="left" if from_left else "right")
        return self.tokenizer.post_process(found, None, True).ids

    @functools.cached_property
    def bound(self) -> TextBound | None:
        return bound_of(self.tokenizer)

    def in_lower_case(self) -> FastEncoder:
        return FastEncoder(in_lower_case(copy.deepcopy(self.tokenizer)))

    @panics_told
    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def piece(self, token: int) -> str | None:
        return self.tokenizer.id_to_token(token)

    def vocabulary(self) -> dict[str, int]:
        return self.tokenizer.get_vocab(with_added_tokens=True)


class AutoEncoder:
    """Any tokenizer that transformers can read without running a checkpoint's code."""

    def __init__(self, folder: Path) -> None:
        # transformers reads whichever of the files it knows, and follows every link.
        for entry in folder.iterdir():
            if entry.name == TEMPLATES or not entry.is_dir():
                check_link(entry)
        try:
            # A panic of the library is told as what it is, before it can end anything.
            read = panics_told(auto_tokenizer_from_pretrained)
            self.tokenizer = read(folder, trust_remote_code=False)
        except CheckpointError as error:
            error.file = error.file or str(folder)
            raise
        except Exception as error:
            # Whatever its files make transformers raise.
            raise CheckpointError(
                f"the tokenizer cannot be read: {error}",
                code="tokenizer",
                file=str(folder),
                expected="files that transformers' AutoTokenizer reads without code of the checkpoint",
                fix="Pass token ids, or copy a tokenizer.json beside the weights.",
            ) from None

    @panics_told
    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def encode_cut(self, text: str, length: int, from_left: bool) -> list[int]:
        self.tokenizer.truncation_side = "left" if from_left else "right"
        return self.tokenizer.encode(text, truncation=True, max_length=length)

    def in_lower_case(self) -> AutoEncoder:
        made = copy.copy(self)
        made.__dict__.pop("bound", None)
        made.tokenizer = copy.deepcopy(self.tokenizer)
        if made.tokenizer.is_fast:
            in_lower_case(made.tokenizer.backend_tokenizer)
        else:
            made.tokenizer.do_lower_case = True
        return made

    @functools.cached_property
    def bound(self) -> TextBound | None:
        return bound_of(self.tokenizer.backend_tokenizer) if self.tokenizer.is_fast else None

    @panics_told
    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def piece(self, token: int) -> str | None:
        piece = self.tokenizer.convert_ids_to_tokens(token)
        return piece if isinstance(piece, str) else None

    def vocabulary(self) -> dict[str, int]:
        return dict(self.tokenizer.get_vocab())


def in_lower_case(tokenizer: Any) -> Any:
    """Let a tokenizer of the `tokenizers` library, which is returned, put texts in lower case before all else."""
    from tokenizers.normalizers import Lowercase
    from tokenizers.normalizers import Sequence as InOrder

    own = tokenizer.normalizer
    tokenizer.normalizer = InOrder([Lowercase()] if own is None else [Lowercase(), own])
    return tokenizer


# The message of transformers' error for a list.
LIST_ERROR = "'list' object has no attribute"


def auto_tokenizer_from_pretrained(path: str | Path, **options: Any) -> Any:
    """Call transformers' AutoTokenizer.from_pretrained, also where `extra_special_tokens` is a list.

    Versions of transformers that expect an object there fail on a list (an AttributeError that says so); they then get
    the tokens under the names extra_special_token_0, 1, ... Any other failure is raised as it is.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, **options)
    except AttributeError as error:
        tokens = read_json(Path(path) / "tokenizer_config.json").get("extra_special_tokens")
        if LIST_ERROR not in str(error) or not isinstance(tokens, list) or "extra_special_tokens" in options:
            raise
    named = {f"extra_special_token_{index}": token for index, token in enumerate(tokens)}
    return AutoTokenizer.from_pretrained(path, extra_special_tokens=named, **options)
