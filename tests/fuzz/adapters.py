"""Adapters: adapter_config.json and the tensors of LoRA adapters, on a tiny model.

The answer is the logits with the adapter. Whatever becomes of it, the model is afterwards as it was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from safetensors.torch import save
from torch import Tensor

from pymllm import load_model
from pymllm.adapters import load_lora_weights, loaded_adapters, unload_lora_weights

from ..checkpoints import write_checkpoint
from ..forward import logits_of
from .headers import joined, split
from .inputs import NASTY, Input, changed_bytes, changed_json, chosen, dumped

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
IDS = torch.tensor([3, 1, 4, 1, 5])

# As PEFT writes them.
USUAL: dict[str, Any] = {
    **{
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "x",
        "peft_version": "0.21.2",
    },
    **{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False},
    **{"fan_in_fan_out": False, "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {}},
    **{"alpha_pattern": {}, "init_lora_weights": True, "inference_mode": True, "modules_to_save": None},
    **{"exclude_modules": None, "lora_bias": False, "auto_mapping": None},
}
SUBJECTS: dict[str, dict[str, Any]] = {
    "names": {**USUAL, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "an expression": {**USUAL, "target_modules": r".*\.(q_proj|o_proj)", "use_rslora": True},
    "patterns": {
        **{
            **USUAL,
            "target_modules": ["k_proj", "up_proj"],
            "rank_pattern": {"up_proj": 2, r".*\.k_proj": 3},
        },
        **{"alpha_pattern": {"up_proj": 5}, "layers_to_transform": [0], "layers_pattern": ["layers"]},
    },
}
LAYERS = {
    **{"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)},
    **{"up_proj": (64, 32), "down_proj": (32, 64)},
}
TARGETS = {
    "names": ("q_proj", "v_proj", "down_proj"),
    "an expression": ("q_proj", "o_proj"),
    "patterns": ("k_proj", "up_proj"),
}
RANKS = {("patterns", "up_proj"): 2, ("patterns", "k_proj"): 3}
# Fields that may say something else, and be right; every other contradicts the tensors, or asks for what is not done.
MEANT = ("lora_alpha", "alpha_pattern", "data", "nothing")


class Adapters:
    """Loading an adapter, and asking with it."""

    name = "adapters"

    def __init__(self) -> None:
        self.model: Any = None
        self.known: dict[str, Tensor] = {}

    def prepare(self, folder: Path) -> None:
        self.folder = folder / "model"
        write_checkpoint(self.folder, **SIZES)
        self.tensors = {subject: save(self._tensors(subject)) for subject in SUBJECTS}

    def _tensors(self, subject: str) -> dict[str, Tensor]:
        generator, tensors = torch.Generator().manual_seed(1), {}
        for layer in TARGETS[subject]:
            outputs, inputs = LAYERS[layer]
            part = "mlp" if layer in ("up_proj", "down_proj") else "self_attn"
            name, rank = f"base_model.model.model.layers.0.{part}.{layer}", RANKS.get((subject, layer), 4)
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
        return tensors

    def inputs(self) -> SearchStrategy[Input]:
        return chosen((6, self._configs), (3, self._headers), (1, self._bytes), (1, self._kept))

    def _configs(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            subject = draw(st.sampled_from(sorted(SUBJECTS)))
            nasty = (
                *NASTY,
                '"all-linear"',
                '["q_proj"]',
                '"gaussian"',
                '{"q_proj": 1000000}',
                "1000000",
                '"LOHA"',
            )
            text, changed = draw(changed_json(SUBJECTS[subject], nasty))
            return self._input(subject, changed, text, self.tensors[subject])

        return make()

    def _headers(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            subject = draw(st.sampled_from(sorted(SUBJECTS)))
            header, rest = split(self.tensors[subject])
            types = ('"F32"', '"F16"', '"I32"', '"BF16"', "[32, 4]", "[4, 32]", "[4, 16, 2]", "[0, 32]")
            text, changed = draw(changed_json(header, NASTY + types))
            return self._input(subject, f"data: {changed}", dumped(SUBJECTS[subject]), joined(text, rest))

        return make()

    def _bytes(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            subject = draw(st.sampled_from(sorted(SUBJECTS)))
            data, changed = draw(changed_bytes(self.tensors[subject]))
            return self._input(subject, f"data: {changed}", dumped(SUBJECTS[subject]), data)

        return make()

    def _kept(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            subject = draw(st.sampled_from(sorted(SUBJECTS)))
            keys = draw(st.permutations(list(SUBJECTS[subject])))
            nothing = draw(
                st.sampled_from(({}, {"a_new_field": None}, {"a_new_field": False}, {"revision": "main"}))
            )
            text = json.dumps({**{key: SUBJECTS[subject][key] for key in keys}, **nothing}, indent=1).encode()
            files = {CONFIG: text, WEIGHTS: self.tensors[subject]}
            return Input(subject, files, f"keys in another order, {nothing}", "keeps")

        return make()

    def _input(self, subject: str, changed: str, config: bytes, weights: bytes) -> Input:
        means = any(name in change for change in changed.split("; ") for name in MEANT)
        # Scaled by the root of the rank, or not: both are right.
        means = means or "replace use_rslora by true" in changed or "replace use_rslora by false" in changed
        means = means or "delete use_rslora" in changed or "replace use_rslora by null" in changed
        return Input(subject, {CONFIG: config, WEIGHTS: weights}, changed, "means" if means else "breaks")

    def judge(self, given: Input, folder: Path) -> bool:
        if self.model is None:
            self.model = load_model(self.folder, device="cpu", dtype="float32")
            self.plain = logits_of(self.model, IDS)
        if given.subject not in self.known:
            good = Input(
                "", {CONFIG: dumped(SUBJECTS[given.subject]), WEIGHTS: self.tensors[given.subject]}, ""
            )
            self.known[given.subject] = self._logits(good.write(folder / "good"))
        return torch.equal(self._logits(given.write(folder / "given")), self.known[given.subject])

    def _logits(self, adapter: Path) -> Tensor:
        try:
            load_lora_weights(self.model, adapter)
            return logits_of(self.model, IDS)
        finally:
            if loaded_adapters(self.model):
                unload_lora_weights(self.model)
            if not torch.equal(logits_of(self.model, IDS), self.plain):
                self.model = None
                raise AssertionError("the model is not as it was")
