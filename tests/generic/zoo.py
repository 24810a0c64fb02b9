"""Tiny checkpoints of every decoder type that transformers knows, made by rule, and what it computes of each.

A config starts as its class' defaults. SIZES shrinks what is large, by the setting's name. Then every other scalar is
moved away from its default, one after the other (`moves`): a move stays if the type still builds, runs, is causal, and
answers otherwise than before. What cannot be had by rule is in SETTINGS. Weights depend on their names alone, and none
is 0 or 1: what a model leaves out shows in its logits.
"""

# T tokens, V vocabulary

from __future__ import annotations

import contextlib
import copy
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto import modeling_auto

LAYERS = 4
CAUSAL = len(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)  # types of AutoModelForCausalLM
SPECIAL_TOKENS = 8  # ids that no prompt has
# The first pattern that a setting's whole name matches says its size.
SIZES: dict[str, int] = {
    r"num_kv_shared_layers|.*_(period|interval|every_n_layers|pattern)|layer_group_size": 2,
    r".*_layer_offset": 1,
    r"mamba_d_ssm": 64,
    r"(mamba_)?(d_head|head_?dim)|kv_channels|attention_head_dim": 16,
    r"index_n_heads": 16,  # so many that hardly any score is a tie of zeros
    r"index_topk|index_kpool": 8,
    r".*vocab_size.*|.*_vocab": 160,
    r"hidden_size_per_layer_input|ple_embed_dim": 16,
    r"(encoder|decoder|num|n)?_?(hidden_|decoder_|encoder_)?layers?|num_blocks|num_layers_per_stack|depth": LAYERS,
    r".*(num_|n_|_)(key_value|kv|query)_?(heads|groups).*|mamba_n_?groups|n_groups|linear_num_key_heads": 2,
    r"linear_num_value_heads": 4,
    r"mamba_n(um)?_heads|n_mamba_heads|mamba_num_heads": 8,
    r".*(num_|n_|_|^)(attention_)?heads?(_per_layer)?": 4,
    r".*top_?k(_experts|_blocks)?|num_experts_per_tok(en)?|moe_k|topk_group": 2,
    r"n_group|num_expert_group": 4,
    r"(moe_|n_)?(num_)?(local_|routed_)?experts": 8,
    r"(first_k_dense_replace|num_dense_layers|(moe_)?num_shared_experts|n_shared_experts)": 1,
    r".*window(_size|_len)?|local_attention|attention_chunk_size|.*chunk_(size|length)|block_size": 8,
    r"(q|kv|o)_lora_rank|adapter_rank|laurel_rank|hc_lowrank|gated_norm_rank": 32,
    r"qk_rope_head_dim|rotary_dim|.*dt_rank|time_step_rank": 8,
    r"(moe|expert|shared).*(intermediate|hidden|ffn).*size": 48,
    r".*(intermediate|ffn|ff|inner|mlp).*(size|dim)|ffn_dim|dff|dim_ff|d_inner|n_inner|.*ffn_dim": 96,
    r"(max|n)_.*(positions?|position_embeddings)|n_positions|n_ctx|max_seq_len|context_length|.*max_length": 256,
    r".*(_rank|state_size|d_state|head_?dim|d_head|dim_head|head_size|kv_channels|.*_head_dim)": 16,
    r".*(hidden_size(_global)?|d_model|n_embd|embd?_dim|embedding_(size|dim)|lru_width|dim|width)": 64,
}
# Settings that no rule finds, by type.
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "mistral4": {"qk_nope_head_dim": 8, "head_dim": 16},
    "dbrx": {"attn_config": {"rope_theta": 20000.0, "kv_n_heads": 2, "clip_qkv": 1.5}},
    "xmod": {"default_language": "en_XX"},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16], "hash_seed": 1},
    "qwen4_exp_text": {
        "eos_token_id": 2,
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "gemma4_text": {"global_head_dim": 32, "num_global_key_value_heads": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 24,
    },
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
        }
    },
}
# Settings that say how a type is used, not what it computes: they stay (or are set in `shrink`).
USE = re.compile(
    r"output_.*|return_.*|use_cache|is_decoder|is_encoder.*|add_cross_attention|tie_.*|.*bidirectional.*|is_causal|"
    r"causal|.*dropout.*|.*_pdrop|initializer.*|.*init_std.*|chunk_size_feed_forward|.*token_id|dtype|architectures|"
    r"model_type|"
    r"id2label|label2id|problem_type|transformers_version|_.*|pretraining_tp|layerdrop|.*_kernels?|pruned_heads|mode|"
    r"summary_.*|attn_implementation|encoder_no_.*|.*jitter.*|.*_coef|num_logits_to_keep|quantization_config"
)
ACTIVATIONS = ("gelu_pytorch_tanh", "silu", "relu")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CHOICES: dict[str, tuple[str, ...]] = {
    "scoring_func": ("sigmoid", "softmax"),
    "topk_method": ("group_limited_greedy", "noaux_tc"),
    "expert_selection_fn": ("sigmoid", "softmax"),
    "position_embedding_type": ("rope",),
}


def model_types() -> list[str]:
    """Return every type of AutoModelForCausalLM, then what else reads text beside images or sound."""
    names = [*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    return names + [t for t in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if t not in names]


def shrink(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings of a tiny model of the config's class: sizes by rule, all else as it is."""
    settings: dict[str, Any] = {}
    special = iter(range(SPECIAL_TOKENS))
    layers = getattr(config, "num_hidden_layers", None)
    for name, declared in fields(config):
        value = value_of(config, name)
        derived = declared is None and not isinstance(value, PreTrainedConfig)
        if isinstance(value, PreTrainedConfig):
            settings[name] = {**shrink(value), "model_type": value.model_type}
        elif re.fullmatch(r".*token_(id|index)|(bos|eos|pad|unk)_index", name):
            settings[name] = None if value is None else next(special, SPECIAL_TOKENS - 1)
        elif name == "is_decoder":
            settings[name] = True
        elif isinstance(value, (list, tuple)):
            settings[name] = shortened(name, list(value), layers)
        elif (
            derived
            and re.search("expert|top_?k$|moe_.*size|window", name)
            and "int" in annotation(config, name)
        ):
            settings[name] = size_of(name, 512)
        elif derived and value is None and name in ("head_dim", "num_key_value_heads"):
            settings[name] = size_of(name, 16)
        elif derived and isinstance(value, (int, float)):
            continue  # its class computes it
        elif isinstance(value, int) and not isinstance(value, bool):
            settings[name] = size_of(name, value)
        elif value is not None and not re.fullmatch(r"_.*|id2label|label2id|dtype|architectures", name):
            settings[name] = copy.deepcopy(value)
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:  # latent attention groups no heads
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    if "qk_rope_head_dim" in settings and "head_dim" in settings:
        same = vars(config)["head_dim"] == vars(config)["qk_rope_head_dim"]
        settings["head_dim"] = settings["qk_rope_head_dim"] if same else 24
    if "state_size" in settings and "expand" in settings and "num_heads" in settings:
        settings["num_heads"] = settings["expand"] * 4
    if "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
        for rope in nested(settings.get("rope_parameters")):
            turned = int(16 * rope.get("partial_rotary_factor", 1.0)) // 2
            rope["mrope_section"] = [(turned + 1) // 3, (turned + 1) // 3, turned - 2 * ((turned + 1) // 3)]
    settings.update(copy.deepcopy(SETTINGS.get(config.model_type, {})))
    return settings


def fields(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    """Yield the settings that the config's class declares, and what it declares as their defaults."""
    for name, declared in type(config).__dataclass_fields__.items():
        if not isinstance(declared.default, type) and name != "per_layer_config":
            yield name, declared.default


def value_of(config: PreTrainedConfig, name: str) -> Any:
    return vars(config).get(config.attribute_map.get(name, name), vars(config).get(name))


def annotation(config: PreTrainedConfig, name: str) -> str:
    return str(type(config).__dataclass_fields__[name].type)


def nested(rope: Any) -> list[dict[str, Any]]:
    """Return the sets of rotary parameters: one, or one for each kind of layer."""
    if not isinstance(rope, dict):
        return []
    return [rope] if "rope_theta" in rope else [held for held in rope.values() if isinstance(held, dict)]


def size_of(name: str, value: int) -> int:
    """Return the tiny size of a setting, or the value where no rule names it and it is small."""
    for pattern, size in SIZES.items():
        if re.fullmatch(pattern, name):
            return min(value, size) if value > 0 else value
    return value


def shortened(name: str, values: list[Any], layers: int | None) -> list[Any]:
    """Return a list of LAYERS items in which each kind of the list of all layers occurs; other lists as they are."""
    if re.search(r"(_idxs|_ids|_indices|moe_layers|only_layers)$", name):
        return [1, 3]
    if len(values) != layers:
        return values
    kinds = [size_of(name, v) if type(v) is int else v for v in values]
    kinds = [v for i, v in enumerate(kinds) if v not in kinds[:i]]
    # Kinds of MLPs repeat the last, so that they do not go in step with kinds of attention.
    kinds += kinds[-1:] * LAYERS if name.startswith("mlp") else kinds * LAYERS
    return kinds[:LAYERS]


def moves(
    settings: dict[str, Any], config: PreTrainedConfig, yarn: bool
) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    """Yield each scalar's path in the settings, and values away from its default."""
    for name, _ in fields(config):
        value = held = value_of(config, name)
        if isinstance(held, PreTrainedConfig):
            if not re.search("vision|audio|encoder|vq|image|perceiver|qformer", name):
                yield from (((name, *path), values) for path, values in moves(settings[name], held, yarn))
        elif name in ("rope_parameters", "rope_scaling") and isinstance(settings.get(name), dict):
            if yarn and settings[name].get("rope_type") == "default":
                yield (name,), [{**settings[name], **YARN}]
            yield from (((name, *path), values) for path, values in rope_moves(settings[name]))
        elif not USE.fullmatch(name) and name not in ("rope_parameters", "rope_scaling"):
            found = others(name, value, annotation(config, name))
            if found:
                yield (name,), found


def rope_moves(rope: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    """Yield the same for rotary parameters, which may be one set for each kind of layer."""
    for name, value in rope.items():
        if isinstance(value, dict):
            yield from (((name, *path), values) for path, values in rope_moves(value))
        elif name == "rope_theta":
            yield (name,), [value * 0.3]
        elif name == "partial_rotary_factor":
            yield (name,), [0.75 if value == 0.5 else 0.5]
        elif isinstance(value, float):
            yield (name,), [value * 0.75]


def others(name: str, value: Any, annotation: str) -> list[Any]:
    """Return values that a scalar may have instead of its default, the best first."""
    if name == "layer_types" and value and set(value) == {"full_attention"}:
        return [["sliding_attention", "full_attention"] * (LAYERS // 2)]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, str):
        if re.search(r"act(ivation)?(_fn|_function|_func)?$|afn", name):
            return [a for a in ACTIVATIONS if a != value]
        return [c for c in CHOICES.get(name, ()) if c != value]
    if value is None:
        if "window" in name:
            return [8]
        return (
            [2.5 if "cap" in name else 0.7, 2.0]
            if "float" in annotation
            else [True]
            if "bool" in annotation
            else []
        )
    if name in ("num_key_value_heads", "head_dim") and isinstance(value, int):
        return [2 if value == 4 else 32]
    if isinstance(value, list) and value and all(type(v) is float for v in value):
        return [[v * 0.75 + 0.01 * i for i, v in enumerate(value)]]
    if re.search(r"eps(ilon)?$|norm_eps", name):
        return [0.02]
    if re.search(r"soft_?cap|limit|clip|threshold", name) and isinstance(value, (int, float)):
        return [2.5 if "cap" in name else 1.5]
    if re.search(r"theta", name) and isinstance(value, (int, float)):
        return [type(value)(value * 0.3)]
    if isinstance(value, float):
        return [value * 0.75 if value else 0.3, value * 1.25 + 0.1, 0.5]
    if re.search(r"scal(e|ing|ar)|factor|multipl|alpha|beta|query_pre", name) and isinstance(value, int):
        return [24 if "query_pre" in name else value + 1]
    return []


@dataclass
class Made:
    """A tiny model, its settings, and which of them differ from the class' defaults (beside sizes)."""

    model_type: str
    settings: dict[str, Any]
    moved: dict[str, Any] = field(default_factory=dict)

    def config(self) -> PreTrainedConfig:
        return CONFIG_MAPPING[self.model_type](**copy.deepcopy(self.settings))

    def model(self) -> nn.Module:
        config = self.config()
        text = type(config) in AutoModelForCausalLM._model_mapping
        auto = AutoModelForCausalLM if text else AutoModelForImageTextToText
        torch.manual_seed(0)
        model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        randomize(model)
        return model.requires_grad_(False)

    def put(self, path: tuple[str, ...], value: Any) -> Made:
        made = copy.deepcopy(self)
        place = made.settings
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = value
        made.moved[".".join(path)] = value
        return made


def randomize(model: nn.Module) -> None:
    """Fill all weights from their names: matrices of unit gain, and noise on what has a start of its own."""
    named = [
        *model.named_parameters(),
        *((n, b) for n, b in model.named_buffers() if n in model.state_dict()),
    ]
    for name, tensor in named:
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        buffer = not isinstance(tensor, nn.Parameter)
        if buffer and tensor.numel() > 1 and len(tensor.unique()) > 1:
            continue  # computed from the config
        if tensor.dim() < 2 or re.search(r"A_log|dt_bias|A$|layer_scalar|(^|\.)D$", name):
            tensor.data.add_(0.2 * noise)
        else:
            tensor.data.copy_(noise * tensor.shape[-1] ** -0.5)


def prompt(tokens: int, seed: int = 0) -> list[int]:
    """Return token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SPECIAL_TOKENS, 150, (tokens,), generator=generator).tolist()


def logits_of(model: nn.Module, ids: list[int]) -> Tensor:
    """Return [T, V] float32, by one forward over the whole prompt."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


class NotADecoder(Exception):
    """A type whose earlier logits depend on later tokens."""


def checked_logits(made: Made) -> Tensor:
    """Return the logits of a prompt.  Raises NotADecoder unless they are causal and finite."""
    model, ids = made.model(), prompt(21)
    logits = logits_of(model, ids)
    if not bool(logits.isfinite().all()):
        raise NotADecoder("its logits are not finite")
    shorter = logits_of(model, ids[:13])
    if logits.shape[0] != len(ids) or float((shorter - logits[:13]).abs().max()) > 1e-3 * float(
        logits.abs().max()
    ):
        raise NotADecoder("logits of a token depend on later tokens")
    return logits


def small(model_type: str) -> Made:
    """Return a tiny model of the type whose scalars are its class' defaults."""
    return Made(model_type, shrink(CONFIG_MAPPING[model_type]()))


def make(model_type: str, *, tied: bool = False) -> Made:
    """Return a tiny model of the type with every scalar moved that can be.  Raises what transformers raises."""
    made = small(model_type)
    before = checked_logits(made)
    try:
        other = made.put(("tie_word_embeddings",), tied)
        before, made = checked_logits(other), other
    except Exception:
        pass
    for path, values in moves(made.settings, made.config(), yarn=tied):
        for value in values:
            with contextlib.suppress(Exception):
                other = made.put(path, value)
                logits = checked_logits(other)
                if logits.shape == before.shape:
                    if float((logits - before).abs().max()) <= 1e-3 * float(before.abs().max()):
                        continue
                    before, made = logits, other
                    break
    return made


def greedy(model: nn.Module, ids: list[int], tokens: int) -> tuple[list[int], float]:
    """Return a greedy continuation, each token of a whole forward, and the least lead of a token over the next best."""
    found, lead = list(ids), float("inf")
    for _ in range(tokens):
        best = logits_of(model, found)[-1].topk(2)
        lead = min(lead, float(best.values[0] - best.values[1]))
        found.append(int(best.indices[0]))
    return found[len(ids) :], lead


LENGTHS = (21, 5, 34)
TOKENS = 8
LEAD = 2e-3  # how far a greedy token leads, so that rounding does not decide


def write(made: Made, folder: Path) -> dict[str, Any]:
    """Save the model under published names, and what transformers makes of three prompts, in expected.pt."""
    model = made.model()
    model.save_pretrained(folder)
    # transformers adds what generation alone reads; a greedy answer here ends by its length.
    (folder / "generation_config.json").unlink(missing_ok=True)
    for seed in range(0, 30, len(LENGTHS)):
        prompts = [prompt(tokens, seed + i) for i, tokens in enumerate(LENGTHS)]
        answers = [greedy(model, ids, TOKENS) for ids in prompts]
        lead = min(lead for _, lead in answers)
        if lead > LEAD:
            break
    expected = {
        "model_type": made.model_type,
        "moved": made.moved,
        "prompts": prompts,
        "logits": [logits_of(model, ids) for ids in prompts],
        "answers": [answer for answer, _ in answers],
        "lead": lead,
    }
    torch.save(expected, folder / "expected.pt")
    return expected
