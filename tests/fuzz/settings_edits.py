"""Changes of settings that know their keys: values that other files have there, keys of others, and what each means."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from .inputs import NASTY, Meaning, Raw, dumped, places

Where = tuple[Any, ...]


def _number(low: float, high: float) -> Callable[[Any], bool]:
    def is_right(value: Any) -> bool:
        kind = isinstance(value, (int, float)) and not isinstance(value, bool)
        return kind and math.isfinite(value) and low <= value <= high

    return is_right


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(each) and value == each for each in values)


def _names(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) < 40


def _bool(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _or_none(right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or right(value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(_number(0.01, 1e4)(each) for each in value)


# The settings that no tensor tells, by key, and which values are right ones of them: another right one says something
# else, and a reader cannot know better. All other settings follow from what is stored, or change nothing.
FREE: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "global_rope_theta"), _or_none(_number(1, 1e12))),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps"), _or_none(_number(0, 1))),
    **dict.fromkeys(("hidden_act", "hidden_activation", "intermediate_act"), _names),
    **dict.fromkeys(("num_experts_per_tok", "topk_group", "n_group"), _whole(1, 64)),
    **dict.fromkeys(("norm_topk_prob", "use_sliding_window", "is_causal", "use_qk_norm"), _bool),
    **dict.fromkeys(("sliding_window", "local_attention", "max_window_layers"), _or_none(_whole(0, 2**40))),
    **dict.fromkeys(("sliding_window_pattern", "global_attn_every_n_layers"), _or_none(_whole(1, 64))),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), _or_none(_number(0, 1e6))),
    **dict.fromkeys(
        ("embedding_multiplier", "attention_multiplier", "residual_multiplier"), _number(-1e9, 1e9)
    ),
    **dict.fromkeys(("logits_scaling", "routed_scaling_factor", "swiglu_limit"), _number(-1e9, 1e9)),
    **dict.fromkeys(("scale_emb", "logit_scale", "scale_depth"), _number(-1e9, 1e9)),
    **dict.fromkeys(("query_pre_attn_scalar", "partial_rotary_factor"), _or_none(_number(0, 2**40))),
    **dict.fromkeys(("scoring_func", "topk_method", "score_function", "model_type"), _or_none(_names)),
    **dict.fromkeys(("rope_type", "type", "position_embedding_type"), _or_none(_names)),
    **dict.fromkeys(("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"), _number(0, 1e9)),
    **dict.fromkeys(("attention_factor", "low_freq_factor", "high_freq_factor"), _or_none(_number(0, 1e9))),
    **dict.fromkeys(
        ("original_max_position_embeddings", "max_position_embeddings"), _or_none(_whole(1, 2**40))
    ),
    **dict.fromkeys(("short_factor", "long_factor"), _numbers),
    **dict.fromkeys(("truncate", "rope_interleave", "use_bidirectional_attention", "attention_bias"), _bool),
    "layer_types": lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
    # How activations are rounded, which kernels may follow; of some formats, nothing is stored for it.
    **dict.fromkeys(("activation_scheme", "act_data_type", "scale_fmt"), _or_none(_names)),
    **dict.fromkeys(("act_bits", "act_group_size", "activation_scale_ub"), _number(0, 1e9)),
    **dict.fromkeys(("act_dynamic", "act_sym"), _bool),
    "kv_cache_scheme": lambda value: value is None or isinstance(value, dict),
}
# What is under these is of activations, and of the cache.
FREE_UNDER = (
    "input_activations",
    "input_tensors",
    "kv_cache_scheme",
    "output_activations",
    "act_quant_kwargs",
)
# Under these keys a setting is free, or another word for the same.
FREE_HERE = {"sliding_attention", "full_attention", "rope_parameters", "rope_scaling"}
# As pairs of files say it: how zero points are stored follows from this alone.
UNKNOWABLE = {"checkpoint_format": _names, "quant_algo": _names}


@dataclass(frozen=True)
class Edit:
    """What was done at a place.  new: the value that stands there now, as JSON; None: none does."""

    way: str
    path: Where
    new: str | None = None

    def __str__(self) -> str:
        text = f"{self.way} {'.'.join(map(str, self.path))}"
        return text if self.new is None else f"{text} by {self.new[:40]}"

    @property
    def meaning(self) -> Meaning:
        """What the file says after it."""
        names = [part for part in self.path if isinstance(part, str)]
        name = names[-1] if names else ""
        if self.way == "twice":
            return "breaks"
        if self.way in ("delete", "rename"):
            free = name in FREE or name in UNKNOWABLE or set(names) & (FREE_HERE | {*FREE_UNDER})
            return "means" if free else "breaks"
        if self.way == "unknown":
            return "breaks"
        try:
            value = json.loads(self.new or "null")
        except (ValueError, RecursionError):
            return "breaks"
        if set(names[:-1]) & {*FREE_UNDER}:
            return "means"
        if name in FREE_UNDER:
            return "means" if value is None or isinstance(value, dict) else "breaks"
        if name in FREE_HERE:
            return "means" if value is None or isinstance(value, dict) else "breaks"
        right = FREE.get(name) or UNKNOWABLE.get(name)
        in_list = bool(self.path) and not isinstance(self.path[-1], str)
        if in_list:
            return "means" if name in ("layer_types", "short_factor", "long_factor") else "breaks"
        return "means" if right is not None and right(value) else "breaks"


@st.composite
def edited(
    draw: Any,
    value: Any,
    pool: Mapping[str, tuple[Any, ...]],
    under: Where = (),
    nasty: tuple[str, ...] = NASTY,
) -> tuple[bytes, list[Edit]]:
    """Change a place of a JSON value or two.

    pool: values that other files have, by key.  under: the part of the value that is changed.  Returns its text, and
    what was done.
    """
    value = copy.deepcopy(value)
    done: list[Edit] = []
    twice: list[tuple[str, str]] = []
    for _ in range(draw(st.sampled_from((1, 1, 1, 1, 2)))):
        inside = [path for path in places(value) if len(path) > len(under) and path[: len(under)] == under]
        if not inside:
            break
        path = draw(st.sampled_from(inside))
        holder = value
        for step in path[:-1]:
            holder = holder[step]
        last, old = path[-1], holder[path[-1]]
        known = pool.get(last, ()) if isinstance(last, str) else ()
        ways = ["nasty", "nasty", "delete", "wrap"]
        ways += ["known"] * 4 if known else []
        ways += ["rename", "twice", "unknown", "add", "add"] if isinstance(holder, dict) else ["repeat"]
        ways += ["near", "near"] if isinstance(old, (int, float)) and not isinstance(old, bool) else []
        ways += ["not"] * 2 if isinstance(old, bool) else []
        way = draw(st.sampled_from(ways))
        if way in ("nasty", "known", "near", "not", "wrap"):
            if way == "nasty":
                new = draw(st.sampled_from(nasty))
            elif way == "known":
                new = json.dumps(draw(st.sampled_from(known)))
            elif way == "near":
                by = draw(st.sampled_from((-1, 1, 0.5, -2 * old, old, 64, -old / 2, 0.0)))
                new = json.dumps(old + by)
            elif way == "not":
                new = json.dumps(not old)
            else:
                new = json.dumps(draw(st.sampled_from(([old], {"value": old}, str(old)))))
            holder[last] = Raw(new)
            done.append(Edit("set", path, new))
        elif way == "delete":
            del holder[last]
            done.append(Edit(way, path))
        elif way == "rename":
            to = draw(st.sampled_from((f"{last}x", f" {last}", str(last).upper(), f"_{last}", "")))
            holder[to] = holder.pop(last)
            done.append(Edit(way, path))
        elif way == "unknown":
            new = draw(st.sampled_from(nasty))
            holder[f"{last}_{draw(st.sampled_from(('v2', 'scale', 'fn', 'dtype')))}"] = Raw(new)
            done.append(Edit(way, path, new))
        elif way == "add":
            key = draw(st.sampled_from(sorted(set(pool) - set(holder)) or ["x"]))
            new = json.dumps(draw(st.sampled_from(pool.get(key, (1,)))))
            holder[key] = Raw(new)
            done.append(Edit(way, (*path[:-1], key), new))
        elif way == "repeat":
            holder.insert(int(last), old)
            done.append(Edit(way, path, json.dumps(old if not isinstance(old, Raw) else str(old))))
        else:
            new = draw(st.sampled_from((*nasty, *map(json.dumps, known))))
            twice.append((json.dumps(last), new))
            done.append(Edit(way, path, new))
    text = dumped(value)
    for key, other in twice:
        text = text.replace(f"{key}:".encode(), f"{key}: {other}, {key}:".encode("utf-8", "surrogatepass"), 1)
    return text, done


def meaning_of(done: list[Edit]) -> Meaning:
    """Return what several changes mean together: as little as is known of any."""
    meanings = {edit.meaning for edit in done}
    # Two of them may fit each other, and say together what neither says alone.
    if len(done) > 1 and not any(edit.way == "twice" for edit in done):
        structural = all(edit.way in ("set", "add", "delete") for edit in done)
        return "means" if structural or "means" in meanings else "breaks"
    return "means" if "means" in meanings and "breaks" not in meanings else "breaks"


def pool_of(values: list[Any]) -> dict[str, tuple[Any, ...]]:
    """Collect the values of each key over many files."""
    found: dict[str, list[Any]] = {}

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                known = found.setdefault(key, [])
                if inner not in known or not any(type(inner) is type(e) and inner == e for e in known):
                    known.append(inner)
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    for value in values:
        walk(value)
    return {key: tuple(each) for key, each in found.items()}
