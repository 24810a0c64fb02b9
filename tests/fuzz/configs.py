"""Settings of checkpoints: config.json with its quantisation, files of settings beside it, generation_config.json."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from .inputs import Input, changed_bytes, chosen
from .settings_edits import edited, meaning_of, pool_of
from .subjects import Checkpoints, logits, logits_of_llm, subjects

CONFIG = "config.json"
ENCODERS = ("bert", "modernbert")
SECTIONS = ("quantization_config", "quantization")
BESIDE = ("quantize_config.json", "hf_quant_config.json")
GENERATION = "generation_config.json"
# Settings that some file has, and which a reader must not take for nothing.
KNOWN = {
    "sliding_window": 3,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "embedding_multiplier": 12.0,
    "logit_scale": 0.5,
    "clip_qkv": 1.0,
    "alibi": True,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "tie_word_embeddings": True,
    "kv_cache_scheme": {
        "num_bits": 8,
        "type": "float",
        "strategy": "tensor",
        "dynamic": False,
        "symmetric": True,
    },
    "attention_bias": True,
    "mlp_bias": True,
    "use_qk_norm": True,
    "bits": 3,
    "group_size": 16,
    "sym": False,
    "desc_act": True,
    "symmetric": False,
    "zero_point": False,
    "num_bits": 4,
    "actorder": "group",
    "checkpoint_format": "gptq_v2",
    "lm_head": True,
    "targets": ["re:.*mlp.*"],
    "transform_config": {"config_groups": {"a": {"type": "hadamard"}}},
    "pre_quant_scale": True,
    "sparsity_config": {"format": "sparse-24-bitmask"},
    "bnb_4bit_quant_type": "fp4",
    "modules_to_not_convert": ["model.layers.0.mlp"],
    "dynamic": {"+:.*down.*": {"bits": 8}},
    "text_config": {},
    "auto_map": {"AutoModel": "evil.Model"},
}


class Configs:
    """A good checkpoint under other settings: planned, loaded, run."""

    name = "configs"

    def prepare(self, folder: Path) -> None:
        self.checkpoints = Checkpoints(folder, subjects())
        self.values: dict[tuple[str, str], Any] = {}

    def _value(self, subject: str, file: str) -> Any:
        key = subject, file
        if key not in self.values:
            self.values[key] = json.loads((self.checkpoints.folder(subject) / file).read_text())
        return self.values[key]

    def inputs(self) -> SearchStrategy[Input]:
        if not hasattr(self, "pool"):
            names = list(self.checkpoints.writers)
            self.pool = pool_of([*(self._value(name, CONFIG) for name in names), KNOWN])
            self.quantised = {
                name: section
                for name in names
                for section in SECTIONS
                if isinstance(self._value(name, CONFIG).get(section), dict)
            }
            self.families = [name for name in names if name not in self.quantised]
            self.settings = pool_of(
                [*(self._value(name, CONFIG)[section] for name, section in self.quantised.items()), KNOWN]
            )
            self.beside = [
                (name, file)
                for name in names
                for file in (*BESIDE, GENERATION)
                if (self.checkpoints.folder(name) / file).exists()
            ]
        return chosen(
            (6, self._quantisation),
            (3, self._models),
            (1, self._anywhere),
            (2, self._side_files),
            (1, self._grafts),
            (1, self._bytes),
            (1, self._kept),
        )

    @st.composite
    @staticmethod
    def _edit(draw: Any, self: Configs, subjects: Any, file: str, inside: bool, pool: Any) -> Input:
        subject = draw(st.sampled_from(subjects))
        under = (self.quantised[subject],) if inside else ()
        text, done = draw(edited(self._value(subject, file), pool, under))
        meaning = meaning_of(done)
        # No tensor of an encoder tells into how many heads its rows are divided.
        if subject in ENCODERS and any(edit.path[-1:] == ("num_attention_heads",) for edit in done):
            meaning = "means"
        return Input(subject, {file: text}, "; ".join(map(str, done)) or "nothing", meaning)

    def _quantisation(self) -> SearchStrategy[Input]:
        return Configs._edit(self, list(self.quantised), CONFIG, True, self.settings)

    def _models(self) -> SearchStrategy[Input]:
        return Configs._edit(self, self.families, CONFIG, False, self.pool)

    def _anywhere(self) -> SearchStrategy[Input]:
        return Configs._edit(self, list(self.checkpoints.writers), CONFIG, False, self.pool)

    def _side_files(self) -> SearchStrategy[Input]:
        pool = self.settings | pool_of([self._value(*each) for each in self.beside])
        return st.one_of([Configs._edit(self, [name], file, False, pool) for name, file in self.beside])

    @st.composite
    @staticmethod
    def _graft(draw: Any, self: Configs) -> Input:
        """Give a checkpoint the quantisation of another, in config.json or beside it."""
        subject = draw(st.sampled_from(list(self.checkpoints.writers)))
        other = draw(st.sampled_from(list(self.quantised)))
        settings = self._value(other, CONFIG)[self.quantised[other]]
        changed = f"the quantisation of {other}"
        if draw(st.booleans()):
            config = {**self._value(subject, CONFIG), "quantization_config": settings}
            return Input(subject, {CONFIG: json.dumps(config).encode()}, changed)
        file = draw(st.sampled_from(BESIDE))
        return Input(subject, {file: json.dumps(settings).encode()}, f"{changed} in {file}")

    def _grafts(self) -> SearchStrategy[Input]:
        return Configs._graft(self)

    @st.composite
    @staticmethod
    def _changed_bytes(draw: Any, self: Configs) -> Input:
        subject = draw(st.sampled_from(list(self.checkpoints.writers)))
        data = (self.checkpoints.folder(subject) / CONFIG).read_bytes()
        new, changed = draw(changed_bytes(data))
        # A letter of a key, a digit of a number: what says nothing of the sort must not change the answer.
        return Input(subject, {CONFIG: new}, changed, "means")

    def _bytes(self) -> SearchStrategy[Input]:
        return Configs._changed_bytes(self)

    @st.composite
    @staticmethod
    def _reordered(draw: Any, self: Configs) -> Input:
        subject = draw(st.sampled_from(list(self.checkpoints.writers)))
        value = self._value(subject, CONFIG)
        keys = draw(st.permutations(list(value)))
        text = json.dumps({key: value[key] for key in keys}, indent=draw(st.sampled_from((None, 1, "\t"))))
        text = draw(st.sampled_from(("", "\n", " "))) + text + draw(st.sampled_from(("", "\n", "  ")))
        return Input(subject, {CONFIG: text.encode()}, "keys in another order, spaces", "keeps")

    def _kept(self) -> SearchStrategy[Input]:
        return Configs._reordered(self)

    def judge(self, given: Input, folder: Path) -> bool:
        path = self.checkpoints.copy(given.subject, folder, given.files)
        # A quarter goes the whole way, by what it is: a case that is kept is judged as it was found.
        whole = GENERATION in given.files or zlib.crc32(b"".join(given.files.values())) % 4 == 0
        found = (logits_of_llm if whole else logits)(path)
        return torch.equal(found, self.checkpoints.answer(given.subject, logits))
