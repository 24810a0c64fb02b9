"""What GGUF files of an architecture call a model's tensors, and what their writers change in them.

All of it is data that reads in both directions: from a file to the model (`model_names`, `restored`), and from the
model to a file (`file_name`, `stored`). The models' definitions hold it, by `general.architecture`.
"""

# D head size, E experts

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

# The part of a tensor's name before ".weight" or ".bias" -> its module's name in the model.
MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# What stands after "blk.N." -> the module within a layer that it is. A name with its ending, ".weight" or ".bias", is
# one tensor; several modules share its rows, in this order; "{}" is an expert's index, which counts the first dim.
Modules = str | tuple[str, ...]
ATTENTION_MODULES: dict[str, Modules] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
LAYER_MODULES: dict[str, Modules] = {
    **ATTENTION_MODULES,
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER = re.compile(r"blk\.(0|[1-9]\d*)\.(\w+)")
MODEL_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def expert_modules(
    block: str = "mlp",
    router: str = "gate",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> dict[str, Modules]:
    """Return the modules of a layer's router and experts.  block: their block within the layer."""
    gate, up, down = (f"{block}.experts.{{}}.{name}" for name in names)
    return {
        "ffn_gate_inp": f"{block}.{router}",
        "ffn_gate_exps": gate,
        "ffn_up_exps": up,
        "ffn_down_exps": down,
        "ffn_gate_up_exps": (gate, up),
    }


# Settings of experts -> config.json's keys; and the only values that further ones may have, where the model has no
# setting for them.
EXPERT_SETTINGS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
EXPERT_CONSTANTS: dict[str, tuple[Any, ...]] = {
    "expert_gating_func": (0, 1),  # softmax
    "expert_weights_scale": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
}


@dataclass(frozen=True)
class Interleaved:
    """A change of rows: the two halves of each head's rows in turns, 0, D/2, 1, D/2 + 1, ...

    rows: what is changed together.
    """

    head_dim: int

    @property
    def rows(self) -> int:
        return self.head_dim

    def stored(self, rows: Tensor) -> Tensor:
        """Put the rows of whole heads in the file's order."""
        heads = rows.unflatten(0, (-1, 2, self.head_dim // 2))
        return heads.transpose(1, 2).flatten(0, 2)

    def restored(self, rows: Tensor) -> Tensor:
        """Put the rows of whole heads in the model's order."""
        heads = rows.unflatten(0, (-1, self.head_dim // 2, 2))
        return heads.transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class Raised:
    """A change of values: files hold `amount` more."""

    amount: float
    rows: ClassVar[int] = 1

    def stored(self, values: Tensor) -> Tensor:
        """Turn the model's values into the file's."""
        return values + self.amount

    def restored(self, values: Tensor) -> Tensor:
        """Turn the file's values into the model's."""
        return values - self.amount


Change = Interleaved | Raised


def _nothing(config: dict[str, Any]) -> None:
    """Leave the config as it is."""


@dataclass(frozen=True)
class GGUFArchitecture:
    """A model definition's word on its GGUF files.

    model_type: Hugging Face's.  layer_modules: see `LAYER_MODULES`.
    interleaved: whether q and k are stored in the other rotary order.  norms_raised_by: see `Raised`.
    settings: keys after "ARCHITECTURE.", beside the usual ones, and config.json's keys.  constants: further keys, and
    the only values that they may have.  required: keys, beside those of every model, that a file must have.
    fixed: settings that no file spells, or that a file may leave out, by config.json's keys.
    sliding: None: no layer has a window.  0: every layer has the file's.  N: of so many layers in a row the last one
    has none, unless the file says otherwise.
    sliding_theta: the rotary base of layers with a window, unless the file has one; None: that of all layers.
    sliding_scaled: whether rotary scaling holds for layers with a window, too.
    windowed_type: the model_type of a file that has a window.
    with_experts: what holds in place of all this for a file that has experts; None: the same.
    finish: completes the config, which has all settings of the file, in place.
    """

    model_type: str
    layer_modules: Mapping[str, Modules] = field(default_factory=lambda: LAYER_MODULES)
    interleaved: bool = False
    norms_raised_by: float = 0.0
    settings: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    sliding: int | None = None
    sliding_theta: float | None = None
    sliding_scaled: bool = True
    windowed_type: str | None = None
    with_experts: GGUFArchitecture | None = None
    finish: Callable[[dict[str, Any]], None] = _nothing

    def model_names(self, stored: str) -> tuple[str, ...]:
        """Return a tensor's names in the model: several that share its rows, with "{}" where it holds all experts.

        A tensor that the model has no name for keeps its own, so that matching reports it.
        """
        module, _, suffix = stored.rpartition(".")
        if module in MODULES:
            return (f"{MODULES[module]}.{suffix}",)
        layer = LAYER.fullmatch(module)
        if layer is None:
            return (stored,)
        prefix = f"model.layers.{layer[1]}."
        whole = self.layer_modules.get(f"{layer[2]}.{suffix}")
        if isinstance(whole, str):
            return (prefix + whole,)
        found = self.layer_modules.get(layer[2])
        if found is None and layer[2] == "attn_rot_embd":
            return (f"{prefix}self_attn.rotary_emb.inv_freq",)
        if found is None:
            return (stored,)
        return tuple(f"{prefix}{name}.{suffix}" for name in ((found,) if isinstance(found, str) else found))

    def file_name(self, name: str) -> tuple[str, int | None] | None:
        """Return the tensor of a file that holds the model's tensor, and the index of its expert there.

        None: files have no such tensor.  Of tensors that several modules share, q_proj is in its own, and so on.
        """
        module, _, suffix = name.rpartition(".")
        for own, model in MODULES.items():
            if module == model:
                return f"{own}.{suffix}", None
        layer = MODEL_LAYER.fullmatch(name)
        if layer is None:
            return None
        inner = re.fullmatch(r"(.+\.experts\.)(\d+)(\..+)", layer[2])
        expert = None if inner is None else int(inner[2])
        wanted = layer[2] if inner is None else f"{inner[1]}{{}}{inner[3]}"
        within, _, suffix = wanted.rpartition(".")
        for own, modules in self.layer_modules.items():
            if modules == wanted:
                return f"blk.{layer[1]}.{own}", expert
            if modules == within:
                return f"blk.{layer[1]}.{own}.{suffix}", expert
        return None

    def change_of(self, name: str, head_dim: int) -> Change | None:
        """Return what writers change in the model's tensor of this name; None: nothing."""
        module, _, suffix = name.rpartition(".")
        if self.interleaved and module.endswith(("self_attn.q_proj", "self_attn.k_proj")):
            return Interleaved(head_dim)
        if self.norms_raised_by and module.endswith("norm") and suffix == "weight":
            return Raised(self.norms_raised_by)
        return None
