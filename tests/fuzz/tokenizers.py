"""Tokenizers: tokenizer.json of every model and with all kinds of steps, the files beside it, and GGUF vocabularies.

The answer is what nasty texts become and come back as. Whatever the files say, the bound by which long prompts are
refused unencoded must hold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from pymllm.errors import CheckpointError
from pymllm.server.protocol.base import parse_json
from pymllm.text import tokenizer_files
from pymllm.text.gguf_tokenizer import SPLITS, GGUFTokenizer
from pymllm.text.tokenizer import TextStream, Tokenizer

from .good_tokenizers import (
    ADDED,
    BESIDE,
    CONFIG,
    FILE,
    GGUF,
    KEY,
    SETTINGS,
    SLOTS,
    SPECIAL,
    SUBJECTS,
    VOCABULARIES,
    added,
)
from .inputs import NASTY, Input, Raw, changed_bytes, changed_json, chosen, dumped

METADATA = "metadata.json"

TEXTS = (
    *(
        "",
        "a",
        "hello world",
        "  he  llo\n\n\t",
        "é中😀\u0301\u200d",
        "\x00\x01\x7f\x85\u2028",
        "<s>a</s> <mask>",
    ),
    *("a" * 300, " " * 300, "\u0301" * 50, "\ufffd\ufeff", "HELLO İSTANBUL ǅ ﬃ", "1234567", "'s 'LL ...!?"),
)
LONG = "hello 中 " * 2100  # beyond LONG_TEXT, where texts go another way


class Tokenizers:
    """Encoding and decoding texts."""

    name = "tokenizers"

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}

    def prepare(self, folder: Path) -> None:
        # Here, once for all children.
        import tokenizers  # noqa: F401
        import transformers  # noqa: F401

    def inputs(self) -> SearchStrategy[Input]:
        return chosen(
            *(
                (6, self._steps),
                (3, self._structure),
                (2, self._vocabulary),
                (3, self._beside),
                (1, self._bytes),
            ),
            *((4, self._gguf), (1, self._foreign), (1, self._kept)),
        )

    def _files(self, subject: str, text: bytes, **others: bytes) -> dict[str, bytes]:
        files = {FILE: text, CONFIG: dumped(SETTINGS)}
        return {**files, **{name: data for name, data in others.items()}}

    def _steps(self) -> SearchStrategy[Input]:
        """Combine steps that each may be right."""

        @st.composite
        def make(draw: Any) -> Input:
            subject = draw(st.sampled_from(sorted(SUBJECTS)))
            made, changed = dict(SUBJECTS[subject]), []
            for slot in draw(st.lists(st.sampled_from(sorted(SLOTS)), min_size=1, max_size=3, unique=True)):
                made[slot] = draw(st.sampled_from(SLOTS[slot]))
                changed.append(f"{slot}: {json.dumps(made[slot])[:60]}")
            flags = draw(
                st.sets(st.sampled_from(("lstrip", "rstrip", "single_word", "normalized")), max_size=2)
            )
            if flags:
                extra = added(len(made["model"]["vocab"]), draw(st.sampled_from(("lo", " w", "é", "<x>"))))
                made["added_tokens"] = [*made["added_tokens"], {**extra, **dict.fromkeys(flags, True)}]
            if made["model"]["type"] == "BPE":
                flag = draw(st.sampled_from(("fuse_unk", "byte_fallback", "ignore_merges")))
                made["model"] = {**made["model"], flag: draw(st.booleans())}
            return Input(subject, self._files(subject, dumped(made)), "; ".join(changed), "means")

        return make()

    def _structure(self) -> SearchStrategy[Input]:
        """Change anything but the vocabulary."""

        @st.composite
        def make(draw: Any) -> Input:
            subject = draw(st.sampled_from(sorted(SUBJECTS)))
            good = SUBJECTS[subject]
            whole = {
                key: Raw(json.dumps(good["model"][key]))
                for key in ("vocab", "merges")
                if key in good["model"]
            }
            steps = tuple(json.dumps(one) for ones in SLOTS.values() for one in ones)
            text, changed = draw(changed_json({**good, "model": {**good["model"], **whole}}, NASTY + steps))
            return Input(subject, self._files(subject, text), changed, "means")

        return make()

    def _vocabulary(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            subject = draw(st.sampled_from(sorted(SUBJECTS)))
            good = SUBJECTS[subject]
            model = dict(good["model"])
            part = draw(st.sampled_from([key for key in ("vocab", "merges") if key in model]))
            text, changed = draw(changed_json(model[part]))
            model[part] = Raw(text.decode("utf-8", "surrogatepass"))
            return Input(
                subject, self._files(subject, dumped({**good, "model": model})), f"{part}: {changed}", "means"
            )

        return make()

    def _beside(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            subject = draw(st.sampled_from(sorted(SUBJECTS)))
            files = self._files(subject, dumped(SUBJECTS[subject]))
            files |= {name: dumped(value) for name, value in BESIDE.items()}
            name = draw(st.sampled_from((CONFIG, SPECIAL, ADDED)))
            text, changed = draw(changed_json({**BESIDE, CONFIG: SETTINGS}[name]))
            return Input(subject, {**files, name: text}, f"{name}: {changed}", "means")

        return make()

    def _bytes(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            subject = draw(st.sampled_from(sorted(SUBJECTS)))
            text, changed = draw(changed_bytes(dumped(SUBJECTS[subject])))
            return Input(subject, self._files(subject, text), changed, "means")

        return make()

    def _gguf(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            subject = draw(st.sampled_from(sorted(GGUF)))
            good = GGUF[subject]
            splits = tuple(json.dumps(split) for split in SPLITS)
            embedded = json.dumps(json.dumps(SUBJECTS["few letters"]))
            if draw(st.booleans()):
                # Whole lists as they are.
                good = {
                    key: Raw(json.dumps(value)) if isinstance(value, list) else value
                    for key, value in good.items()
                }
            text, changed = draw(changed_json({**good, f"{KEY}x": 1}, NASTY + splits + (embedded,)))
            return Input(subject, {METADATA: text}, changed, "means")

        return make()

    def _foreign(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            subject = draw(st.sampled_from(sorted(VOCABULARIES)))
            files = {name: text.encode() for name, text in VOCABULARIES[subject].items()}
            name = draw(st.sampled_from(sorted(files)))
            way = (
                changed_json(json.loads(files[name]))
                if name.endswith(".json")
                else changed_bytes(files[name])
            )
            text, changed = draw(way)
            return Input(subject, {**files, name: text}, f"{name}: {changed}", "means")

        return make()

    def _kept(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            subject = draw(st.sampled_from(sorted(SUBJECTS)))
            good = SUBJECTS[subject]
            keys = [key for key in draw(st.permutations(list(good))) if key != "version"]
            text = json.dumps(
                {"version": "1.0", **{key: good[key] for key in keys}},
                indent=draw(st.sampled_from((None, 1))),
            )
            settings = {key: SETTINGS[key] for key in draw(st.permutations(list(SETTINGS)))}
            files = {FILE: text.encode(), CONFIG: dumped({**settings, "a_new_field": None})}
            return Input(subject, files, "keys in another order, spaces", "keeps")

        return make()

    def judge(self, given: Input, folder: Path) -> bool:
        # One that ends badly is replaced; the others need no start.
        tokenizer_files.LOADER.kept = 1
        found = list(self._answers(self._open(given, folder)))
        if given.meaning != "keeps":
            return False
        if given.subject not in self.known:
            beside = folder / "good"
            good = Input(
                given.subject, self._files(given.subject, dumped(SUBJECTS[given.subject])), "nothing"
            )
            self.known[given.subject] = list(self._answers(self._open(good, beside)))
        return found == self.known[given.subject]

    def _open(self, given: Input, folder: Path) -> Tokenizer:
        if METADATA in given.files:
            metadata = parse_json(given.files[METADATA])
            return GGUFTokenizer(folder / "model.gguf", as_gguf(metadata))
        return Tokenizer(given.write(folder))

    def _answers(self, tokenizer: Tokenizer) -> Iterator[Any]:
        """Do all that is done with a tokenizer; yield what texts become."""
        yield sorted(tokenizer.chat_templates)
        yield tokenizer.special_tokens
        encoder, refused = tokenizer.encoder, 0
        for text in (*TEXTS, LONG):
            try:
                ids = tokenizer.encode(text)
                plain = tokenizer.encode(text, add_special_tokens=False)
            except CheckpointError:
                # Some texts have no ids in a vocabulary.
                refused += 1
                continue
            if encoder.bound is not None and encoder.bound.fewest_tokens(text) > len(plain):
                raise AssertionError(
                    f"{text[:20]!r} has {len(plain)} tokens, and the bound is {encoder.bound}"
                )
            stream = TextStream(tokenizer)
            pieces = [stream.push(token) for token in ids[:40]]
            yield (
                ids,
                tokenizer.decode(ids),
                "".join([*pieces, stream.finish()]),
                tokenizer.encode_cut(text, 3),
            )
        for token in (0, 1, 5, 260, 10**6, 2**31 - 1):
            yield tokenizer.is_special(token), tokenizer.token_bytes(token), tokenizer.token_text(token)
        yield tokenizer.mask_token, tokenizer.in_lower_case().encode("HeLLo <s>")
        yield tokenizer.spellings(("hello", " w", ""))
        if refused > len(TEXTS):
            raise CheckpointError("the tokenizer encodes no text", code="tokenizer")


def as_gguf(value: Any) -> dict[str, Any]:
    """Leave of a JSON object what a GGUF file can hold: no objects, nothing null, and lists of one type."""

    def holds(item: Any) -> bool:
        return (
            not isinstance(item, dict)
            and item is not None
            and not (isinstance(item, int) and abs(item) >= 2**63)
        )

    def array(items: list[Any]) -> list[Any]:
        kept = [array(item) if isinstance(item, list) else item for item in items if holds(item)]
        return [item for item in kept if type(item) is type(kept[0])]

    pairs = value.items() if isinstance(value, dict) else ()
    return {key: array(item) if isinstance(item, list) else item for key, item in pairs if holds(item)}
