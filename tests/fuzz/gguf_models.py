"""GGUF models: header, metadata, tensor descriptions, data.

A case is the head of a file, up to its data, and a list of changes of the data, which are those of a good file.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from .gguf_head import ARRAY, SCALARS, STRING, Head
from .inputs import Input, Meaning, changed_bytes, chosen
from .subjects import SIZES, Checkpoints, llama_weights, logits, logits_of_llm

FILE = "model.gguf"
HEAD, DATA = "head.bin", "data.json"
NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    31,
    32,
    33,
    64,
    96,
    128,
    255,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63,
    2**64 - 1,
)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, 3.4e38, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "",
    "x",
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "mamba",
    "gpt2",
    "../x",
    "\x1b[31m",
    "\x00",
    "a" * 5000,
    "\u202e",
)
TYPES = (*range(44), 99, 2**31, 2**32 - 1)
ALIKE = ({2, 20}, {1, 30}, {18, 21}, {6}, {8})  # types whose blocks are as large, and mean as much
# Endings of the keys that no tensor tells.
FREE = (
    *(
        "rope.freq_base",
        "rope.freq_base_swa",
        "layer_norm_rms_epsilon",
        "attention.sliding_window",
        "context_length",
    ),
    *(
        "expert_used_count",
        "expert_weights_scale",
        "expert_weights_norm",
        "expert_gating_func",
        "logit_scale",
    ),
    *(
        "attention.scale",
        "embedding_scale",
        "residual_scale",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ),
    *(
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "general.architecture",
    ),
    *(
        "rope.scaling.attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.dimension_count",
        "sliding_window_pattern",
    ),
    *("attention.causal", "rope.scale_linear"),
)
# Keys that other files have.
KNOWN: tuple[tuple[str, int, Any], ...] = (
    ("rope.scaling.type", STRING, "linear"),
    ("rope.scaling.factor", 6, 4.0),
    ("attention.sliding_window", 4, 3),
    ("attn_logit_softcapping", 6, 2.0),
    ("logit_scale", 6, 0.5),
    ("expert_count", 4, 4),
    ("expert_used_count", 4, 2),
    ("attention.scale", 6, 0.5),
    ("embedding_length_per_layer_input", 4, 4),
    ("pooling_type", 4, 1),
    ("attention.key_length", 4, 16),
    ("attention.head_count_kv", 4, 4),
)


def _write(folder: Path, family: str, kinds: Any = "F32", **options: Any) -> None:
    from ..gguf_files import write_gguf

    folder.mkdir(parents=True)
    write_gguf(folder / FILE, family, kinds, **(SIZES | options))


def _write_llama(folder: Path, kind: str) -> None:
    """Write a Llama with the `gguf` package alone."""
    import gguf
    import numpy as np

    folder.mkdir(parents=True)
    writer = gguf.GGUFWriter(folder / FILE, "llama")
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(1)
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_key_length(SIZES["head_dim"])
    writer.add_value_length(SIZES["head_dim"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(SIZES["head_dim"])
    writer.add_vocab_size(SIZES["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    number = gguf.GGMLQuantizationType[kind]
    for name, weight in llama_weights(SIZES).items():
        stored = names.get_name(name, try_suffixes=(".weight",))
        values = weight.numpy()
        if weight.ndim == 1:
            writer.add_tensor(stored, values)
        else:
            writer.add_tensor(stored, gguf.quantize(values.astype(np.float32), number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_model(folder: Path, family: str, **settings: Any) -> None:
    from ..gguf_models import write_model

    folder.mkdir(parents=True)
    write_model(folder / FILE, family, **(SIZES | settings))


MODELS = {
    "llama-q8": partial(_write_llama, kind="Q8_0"),
    "llama-q4": partial(_write, family="llama", kinds="Q4_0", vocab_size=96),
    "qwen3-tied": partial(_write, family="qwen3", kinds="F16", tokenizer=False, tie_word_embeddings=True),
    "gemma2-q5": partial(_write, family="gemma2", kinds="Q5_1", tokenizer=False, num_hidden_layers=2),
    "qwen2": partial(_write_model, family="qwen2"),
    "mixtral": partial(_write_model, family="mixtral", num_local_experts=3, num_hidden_layers=1),
    "gpt_oss": partial(_write_model, family="gpt_oss", num_local_experts=3, num_hidden_layers=1),
    "phi3": partial(_write_model, family="phi3", pad_token_id=0, head_dim=24),
}


class Models:
    """A file that is planned, loaded and run."""

    name = "gguf"

    def prepare(self, folder: Path) -> None:
        self.checkpoints = Checkpoints(folder, MODELS)
        self.read: dict[str, tuple[Head, bytes]] = {}

    def _read(self, subject: str) -> tuple[Head, bytes]:
        """Return a good file's head, as a copy, and its data."""
        if subject not in self.read:
            raw = (self.checkpoints.folder(subject) / FILE).read_bytes()
            head, start = Head.read(raw)
            assert head.written() == raw[:start]
            self.read[subject] = head, raw[start:]
        head, data = self.read[subject]
        copied = json.loads(json.dumps([head.entries, head.tensors]))
        return Head(head.version, *copied), data

    def inputs(self) -> SearchStrategy[Input]:
        return chosen(
            (4, partial(Models._metadata, self)),
            (4, partial(Models._described, self)),
            (1, partial(Models._bytes, self)),
            (1, partial(Models._data, self)),
            (1, partial(Models._kept, self)),
        )

    @st.composite
    @staticmethod
    def _metadata(draw: Any, self: Models) -> Input:
        subject = draw(st.sampled_from(list(MODELS)))
        head, _ = self._read(subject)
        index = draw(st.integers(0, len(head.entries) - 1))
        key, kind, value = head.entries[index]
        free = key.endswith(FREE)
        meaning: Meaning = "means" if free else "breaks"
        ways = ("value", "value", "value", "type", "drop", "twice", "rename", "add", "count")
        way = draw(st.sampled_from(ways))
        told = f"{way} {key}"
        if way == "value":
            new = draw(st.sampled_from(self._values(kind, value)))
            head.entries[index][2] = new
            told += f" by {str(new)[:40]}"
        elif way == "type":
            new_kind = draw(st.sampled_from((*SCALARS, STRING, ARRAY, 13, 2**31)))
            head.entries[index][1] = new_kind
            if new_kind == ARRAY:
                head.entries[index][2] = [kind, [value]] if kind != ARRAY else [ARRAY, [value]]
            elif kind == ARRAY:
                head.entries[index][2] = 0
            told += f" by {new_kind}"
        elif way == "drop":
            del head.entries[index]
        elif way == "twice":
            head.entries.append([key, kind, draw(st.sampled_from(self._values(kind, value)))])
            meaning = "breaks"
        elif way == "rename":
            head.entries[index][0] = draw(
                st.sampled_from((f"{key}x", key.upper(), f"x.{key}", "", key + "\n"))
            )
        elif way == "add":
            architecture = next(each[2] for each in head.entries if each[0] == "general.architecture")
            name, kind, new = draw(st.sampled_from(KNOWN))
            if not any(each[0] == f"{architecture}.{name}" for each in head.entries):
                head.entries.append([f"{architecture}.{name}", kind, new])
            meaning = "means" if name.endswith(FREE) else "breaks"
            told = f"add {name}"
        else:
            head.counts[draw(st.integers(0, 1))] += draw(st.sampled_from((-1, 1, 2**32, 2**62, -(2**10))))
            meaning = "breaks"
        return Input(subject, {HEAD: head.written()}, told, meaning)

    @staticmethod
    def _values(kind: int, value: Any) -> tuple[Any, ...]:
        """Return other values of an entry's type."""
        if kind == STRING:
            return TEXTS
        if kind == ARRAY:
            inner, values = value
            others = Models._values(inner, values[0] if values else 0)
            return (
                [inner, []],
                [inner, values[:-1]],
                [inner, values + values[:1]],
                [inner, values[::-1]],
                *([inner, [*values[:-1], other]] for other in others[:6]),
            )
        if kind in (6, 12):
            return (*FLOATS, value * 2, -value)
        if kind == 7:
            return (0, 1, 2, 255)
        return (*NUMBERS, value + 1, max(0, value - 1), value * 2, value // 2)

    @st.composite
    @staticmethod
    def _described(draw: Any, self: Models) -> Input:
        """Change a tensor's description, or two tensors'."""
        subject = draw(st.sampled_from(list(MODELS)))
        head, _ = self._read(subject)
        index = draw(st.integers(0, len(head.tensors) - 1))
        name, sizes, kind, offset = head.tensors[index]
        ways = (
            "name",
            "name",
            "sizes",
            "sizes",
            "type",
            "type",
            "offset",
            "rank",
            "drop",
            "twice",
            "swap",
            "order",
        )
        way = draw(st.sampled_from(ways))
        told, meaning = f"{way} {name}", "breaks"
        entry = head.tensors[index]
        if way == "name":
            others = [each[0] for each in head.tensors if each[0] != name]
            made = (
                f"{name}x",
                name.upper(),
                name.replace("weight", "bias"),
                "",
                name.replace("blk.0", "blk.7"),
            )
            entry[0] = draw(st.sampled_from((*made, f"x.{name}", name + "\x1b", "a" * 2000, *others)))
            told += f" by {entry[0][:40]}"
        elif way == "sizes":
            at = draw(st.integers(0, len(sizes) - 1))
            turned = sizes[::-1]
            flat = [sizes[0] * sizes[1]] if len(sizes) == 2 else [*sizes, 1]
            one = [*sizes]
            one[at] = draw(
                st.sampled_from((*NUMBERS, sizes[at] * 2, sizes[at] // 2, sizes[at] - 32, sizes[at] + 1))
            )
            entry[1] = draw(st.sampled_from((turned, flat, one, one, one, [1, *sizes], [*sizes, 1])))
            # A square is as right the other way round, and a row of one.
            told += f" by {entry[1]}"
        elif way == "type":
            entry[2] = draw(st.sampled_from(TYPES))
            if any({kind, entry[2]} <= alike for alike in ALIKE):
                meaning = "means"
            told += f" by {entry[2]}"
        elif way == "offset":
            entry[3] = draw(
                st.sampled_from((*NUMBERS, offset + 1, offset + 32, max(0, offset - 32), offset * 2))
            )
            told += f" by {entry[3]}"
        elif way == "rank":
            entry[1] = draw(st.sampled_from(([], [1], sizes * 3, [0], [0, *sizes], [2**32, 2**32])))
            told += f" by {entry[1]}"
        elif way == "drop":
            del head.tensors[index]
        elif way == "twice":
            again = [draw(st.sampled_from((name, f"{name}x"))), sizes, kind, offset]
            head.tensors.append(again)
        elif way == "swap":
            alike = [each for each in head.tensors if each[1:3] == [sizes, kind]]
            other = draw(st.sampled_from(alike))
            entry[3], other[3] = other[3], offset
            meaning = "means"
            told += f" with {other[0]}"
        else:
            head.tensors = draw(st.permutations(head.tensors))
            told, meaning = "tensors in another order", "keeps"
        return Input(subject, {HEAD: head.written()}, told, meaning)

    @st.composite
    @staticmethod
    def _bytes(draw: Any, self: Models) -> Input:
        subject = draw(st.sampled_from(list(MODELS)))
        head, _ = self._read(subject)
        new, told = draw(changed_bytes(head.written()))
        return Input(subject, {HEAD: new}, told, "means")

    @st.composite
    @staticmethod
    def _data(draw: Any, self: Models) -> Input:
        """Put NaN or infinity where a block's scale or a norm's value is, cut the file, or let more follow."""
        subject = draw(st.sampled_from(list(MODELS)))
        head, data = self._read(subject)
        name, sizes, kind, offset = draw(st.sampled_from(head.tensors))
        cut = draw(st.sampled_from((0, 0, 0, 1, 31, 32, 100, len(data))))
        if cut:
            changes: list[Any] = [["cut", cut]]
            told = f"cut {cut}"
        else:
            what = draw(st.sampled_from(("nan", "inf", "more")))
            bits = {"nan": b"\x00\x7e", "inf": b"\x00\x7c"}.get(what, b"")
            if kind == 0 and bits:
                bits = {"nan": b"\x00\x00\xc0\x7f", "inf": b"\x00\x00\x80\x7f"}[what]
            changes = (
                [["at", offset, bits.hex()]] if bits else [["more", draw(st.sampled_from((1, 32, 1000)))]]
            )
            told = f"{what} {name}"
        is_weight = kind in (0, 1) and len(sizes) > 1
        meaning: Meaning = "means" if is_weight and "at" in changes[0] else "breaks"
        return Input(subject, {HEAD: head.written(), DATA: json.dumps(changes).encode()}, told, meaning)

    @st.composite
    @staticmethod
    def _kept(draw: Any, self: Models) -> Input:
        subject = draw(st.sampled_from(list(MODELS)))
        head, _ = self._read(subject)
        head.entries = draw(st.permutations(head.entries))
        if draw(st.booleans()):
            head.entries.append(["general.description", STRING, draw(st.sampled_from(TEXTS))])
        head.version = draw(st.sampled_from((2, 3)))
        return Input(subject, {HEAD: head.written()}, "entries in another order", "keeps")

    def judge(self, given: Input, folder: Path) -> bool:
        data = self._read(given.subject)[1]
        for change in json.loads(given.files.get(DATA, b"[]")):
            if change[0] == "cut":
                data = data[: -change[1]]
            elif change[0] == "more":
                data += bytes(change[1])
            else:
                raw = bytes.fromhex(change[2])
                data = data[: change[1]] + raw + data[change[1] + len(raw) :]
        path = folder / FILE
        path.write_bytes(given.files[HEAD] + data)
        whole = len(given.files[HEAD]) % 4 == 0
        found = (logits_of_llm if whole else logits)(path)
        return torch.equal(found, self.checkpoints.answer(given.subject, logits_of_file))


def logits_of_file(folder: Path) -> torch.Tensor:
    """Return the logits of a good file."""
    return logits(folder / FILE)
