"""Parameters that an endpoint does not have, each with the values that ask for nothing; null is always one of them.

A client that writes every field's default is served; any other value is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Neutral = Mapping[str, tuple[Any, ...]]

# Of every endpoint.
COMMON: Neutral = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "extra_body": ({},),
    "extra_headers": ({},),
    "priority": (0,),
    "vllm_xargs": ({},),
    "mm_processor_kwargs": ({},),
    "additional_data": ({},),
}

# Of the endpoints that generate, as vLLM, SGLang, llama.cpp and text-generation-inference name them.
GENERATING: Neutral = {
    **COMMON,
    "skip_special_tokens": (True,),
    # It says how special tokens that are not skipped stand in a text: here they are.
    "spaces_between_special_tokens": (True, False),
    "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,),
    "detokenize": (True,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "length_penalty": (1, 1.0),
    # llama.cpp's looks back 64 tokens: another thing than repetition_penalty.
    "repeat_penalty": (1, 1.0),
    "guided_decoding_backend": ("auto", "guidance"),
    "return_hidden_states": (False,),
    "return_routed_experts": (False,),
    "cache_prompt": (True, False),
    "timings_per_token": (False,),
    "tfs_z": (1, 1.0),
    "top_a": (0, 0.0),
    "top_n_sigma": (-1, -1.0),
    "mirostat": (0,),
    "dynatemp_range": (0, 0.0),
    "dry_multiplier": (0, 0.0),
    "xtc_probability": (0, 0.0),
    "samplers": ([],),
    "grammar_lazy": (False,),
    "watermark": (False,),
    "suffix": ("",),
    "echo": (False,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}

CHAT: Neutral = {
    **GENERATING,
    "modalities": (["text"],),
    # What a model does that is told nothing; "none" of a model that does not reason.
    "reasoning_effort": ("medium", "none"),
    "verbosity": ("medium",),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "documents": ([],),
    "chat_template_kwargs": ({},),
    "media_io_kwargs": ({},),
    "include_reasoning": (True,),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
}

COMPLETIONS: Neutral = {
    **GENERATING,
    # Of other servers' two endpoints, which share their fields.
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}

EMBEDDINGS: Neutral = {
    **COMMON,
    "add_special_tokens": (True,),
    # A text is cut where the model has read as much as it was trained for.
    "truncate": (True,),
    "truncate_prompt_tokens": (-1,),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "task": ("embed",),
}
