"""Rotary positions equal transformers', for every scaling; what is not rotated passes bit for bit."""

# T tokens, H heads, D head size, R rotary size

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from pymllm.errors import ConfigError
from pymllm.layers.rotary_embedding import (
    Gemma4ProportionalRotaryEmbedding,
    PartialRotaryEmbedding,
    RotaryEmbedding,
    get_gemma4_proportional_rope,
    get_rope,
)

HEAD, MAX_POSITION, BASE = 64, 256, 10000.0
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "short_factor": [1.0 + i / 40 for i in range(HEAD // 2)],
    "long_factor": [1.0 + i / 3 for i in range(HEAD // 2)],
    "original_max_position_embeddings": 64,
}
SETTINGS = {
    "default": ("default", {}),
    "linear": ("linear", {"factor": 2.5}),
    "dynamic": ("dynamic", {"factor": 4.0}),
    "dynamic-with-an-original-length": ("dynamic", {"factor": 4.0, "original_max_position_embeddings": 64}),
    "llama3": ("llama3", LLAMA3),
    "yarn": ("yarn", YARN),
    "yarn-without-a-trained-length": ("yarn", {"factor": 4.0}),
    "yarn-no-truncate": ("yarn", YARN | {"truncate": False}),
    "yarn-betas": ("yarn", YARN | {"beta_fast": 16.0, "beta_slow": 2.0}),
    "yarn-all-kept": (
        "yarn",
        {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 16.0},
    ),
    "yarn-mscale": ("yarn", YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}),
    "yarn-mscale-alone": ("yarn", YARN | {"mscale": 0.7}),
    "yarn-attention-factor": ("yarn", YARN | {"attention_factor": 1.5}),
    "longrope": ("longrope", LONG),
    "longrope-attention-factor": ("longrope", LONG | {"attention_factor": 1.25}),
    "yarn-shrinking": ("yarn", {"factor": 0.5, "original_max_position_embeddings": 512}),
}


def transformers_rope(head_size, rope_type, settings, base=BASE, max_position=MAX_POSITION):
    config = LlamaConfig(
        hidden_size=4 * head_size,
        num_attention_heads=4,
        head_dim=head_size,
        max_position_embeddings=max_position,
        rope_parameters={"rope_type": rope_type, "rope_theta": base, **settings},
    )
    return LlamaRotaryEmbedding(config)


def rotated_by_transformers(rope, positions, query, key):
    """query, key: [T, H, D]."""
    cos, sin = rope(query, positions.unsqueeze(0))
    pair = apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)
    return tuple(x[0].transpose(0, 1) for x in pair)


def query_and_key(tokens, head_size=HEAD, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, heads, head_size, generator=generator).to(dtype) for heads in (4, 2)]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("length", (1, 100, MAX_POSITION, 2 * MAX_POSITION), ids=str)
def test_every_scaling_equals_transformers(name, length):
    rope_type, settings = SETTINGS[name]
    ours = get_rope(HEAD, HEAD, MAX_POSITION, BASE, settings, rope_type)
    query, key = query_and_key(length)
    positions = torch.arange(length)
    expected = rotated_by_transformers(transformers_rope(HEAD, rope_type, settings), positions, query, key)
    for actual, wanted in zip(ours(positions, query, key), expected, strict=True):
        assert actual.shape == wanted.shape
        # An angle is a position times a frequency: its rounding, 2^-24 of some hundred radians, is the error.
        assert (actual - wanted).abs().max() <= 2e-4 * length / MAX_POSITION + 1e-5


@pytest.mark.parametrize("name", SETTINGS)
def test_cosines_and_sines_equal_transformers_in_float32(name):
    rope_type, settings = SETTINGS[name]
    ours, theirs = (
        get_rope(HEAD, HEAD, MAX_POSITION, BASE, settings, rope_type),
        transformers_rope(HEAD, rope_type, settings),
    )
    positions = torch.arange(MAX_POSITION)
    cos, sin = ours.cos_sin(positions)
    expected_cos, expected_sin = theirs(torch.zeros(1), positions.unsqueeze(0))
    for actual, wanted in ((cos, expected_cos), (sin, expected_sin)):
        assert torch.allclose(torch.cat((actual, actual), dim=-1), wanted[0], rtol=0, atol=3e-5)


def test_dynamic_scaling_returns_to_the_trained_frequencies_for_a_short_prompt():
    ours = get_rope(HEAD, HEAD, MAX_POSITION, BASE, {"factor": 4.0}, "dynamic")
    plain = get_rope(HEAD, HEAD, MAX_POSITION, BASE)
    query, key = query_and_key(8)
    short = torch.arange(8)
    before = ours(short, query, key)[0]
    ours(short + 3 * MAX_POSITION, query, key)
    assert torch.equal(ours(short, query, key)[0], before)
    assert torch.allclose(before, plain(short, query, key)[0], atol=1e-6)


def test_positions_of_any_order_and_repetition():
    rope, theirs = get_rope(HEAD, HEAD, MAX_POSITION, BASE), transformers_rope(HEAD, "default", {})
    positions = torch.tensor([200, 3, 3, 0, 255, 17])
    query, key = query_and_key(6)
    expected = rotated_by_transformers(theirs, positions, query, key)
    assert torch.allclose(rope(positions, query, key)[0], expected[0], atol=1e-4)


@pytest.mark.parametrize("shape", ("flat", "heads"))
@pytest.mark.parametrize("tokens", (0, 1, 5))
def test_flat_heads_keep_their_shape(shape, tokens):
    rope = get_rope(HEAD, HEAD, MAX_POSITION, BASE)
    query, key = query_and_key(tokens)
    expected = rope(torch.arange(tokens), query, key)
    if shape == "flat":
        query, key = query.flatten(1), key.flatten(1)
    for actual, given, wanted in zip(
        rope(torch.arange(tokens), query, key), (query, key), expected, strict=True
    ):
        assert actual.shape == given.shape and torch.equal(actual.view(wanted.shape), wanted)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_low_precision_is_rounded_once(dtype):
    rope = get_rope(HEAD, HEAD, MAX_POSITION, BASE)
    query, key = query_and_key(32, dtype=dtype)
    positions = torch.arange(32)
    exact = rope(positions, query.float(), key.float())
    for actual, wanted in zip(rope(positions, query, key), exact, strict=True):
        assert actual.dtype is dtype and torch.equal(actual, wanted.to(dtype))


def test_position_zero_changes_nothing():
    query, key = query_and_key(1)
    for actual, given in zip(
        get_rope(HEAD, HEAD, MAX_POSITION, BASE)(torch.zeros(1).long(), query, key), (query, key), strict=True
    ):
        assert torch.equal(actual, given)


# --- part of a head


@pytest.mark.parametrize("rotary_dim", (2, 16, 32, 62))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_tail_of_a_partly_rotated_head_passes_bit_for_bit(rotary_dim, dtype):
    rope = get_rope(HEAD, rotary_dim, MAX_POSITION, BASE)
    assert isinstance(rope, PartialRotaryEmbedding)
    query, key = query_and_key(9, dtype=dtype)
    query[0, 0, -1] = float("nan")
    positions = torch.arange(9) + 40
    for actual, given in zip(rope(positions, query, key), (query, key), strict=True):
        tails = [x[..., rotary_dim:].contiguous().view(torch.uint8) for x in (actual, given)]
        assert torch.equal(*tails)
        head = given[..., :rotary_dim].float()
        theirs = transformers_rope(rotary_dim, "default", {})
        expected = rotated_by_transformers(theirs, positions, head, head)[0]
        tolerance = 1e-4 if dtype is torch.float32 else 0.02
        assert torch.allclose(actual[..., :rotary_dim].float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rope_type", ("linear", "llama3", "yarn", "dynamic"))
def test_scalings_of_a_partly_rotated_head_are_those_of_the_part(rope_type):
    settings = {"linear": {"factor": 2.0}, "llama3": LLAMA3, "yarn": YARN, "dynamic": {"factor": 2.0}}[
        rope_type
    ]
    rope = get_rope(HEAD, 32, MAX_POSITION, BASE, settings, rope_type)
    query, key = query_and_key(300)
    positions = torch.arange(300)
    actual = rope(positions, query, key)[0]
    theirs = transformers_rope(32, rope_type, settings)
    expected = rotated_by_transformers(theirs, positions, query[..., :32], key[..., :32])[0]
    assert torch.allclose(actual[..., :32], expected, atol=3e-4)
    assert torch.equal(actual[..., 32:], query[..., 32:])


@pytest.mark.parametrize("rotary_dim", (16, 32, 64))
def test_gemmas_proportional_frequencies_equal_transformers(rotary_dim):
    rope = get_gemma4_proportional_rope(HEAD, rotary_dim, MAX_POSITION, BASE)
    assert isinstance(rope, Gemma4ProportionalRotaryEmbedding)
    theirs = transformers_rope(HEAD, "proportional", {"partial_rotary_factor": rotary_dim / HEAD})
    query, key = query_and_key(64)
    positions = torch.arange(64)
    for actual, wanted in zip(
        rope(positions, query, key), rotated_by_transformers(theirs, positions, query, key), strict=True
    ):
        assert torch.allclose(actual, wanted, atol=5e-5)
    # Pairs past the rotated part have frequency zero.
    unchanged = [*range(rotary_dim // 2, HEAD // 2), *range(HEAD // 2 + rotary_dim // 2, HEAD)]
    assert torch.equal(rope(positions, query, key)[0][..., unchanged], query[..., unchanged])


# --- the factory


def test_equal_settings_share_one_module():
    scaling = {"factor": 2.0, "other": [1, 2]}
    assert get_rope(HEAD, HEAD, 99, BASE, scaling, "linear") is get_rope(
        HEAD, HEAD, 99, 10000, dict(scaling), "linear"
    )
    assert get_rope(HEAD, HEAD, 99, BASE, {"factor": 3.0}, "linear") is not get_rope(
        HEAD, HEAD, 99, BASE, scaling, "linear"
    )
    assert type(get_rope(HEAD, HEAD, 99, BASE)) is RotaryEmbedding
    assert get_gemma4_proportional_rope(HEAD, 16, 99, BASE) is get_gemma4_proportional_rope(
        HEAD, 16, 99, BASE
    )


def test_a_module_made_on_the_meta_device_is_real():
    with torch.device("meta"):
        rope = get_rope(HEAD, HEAD, 77, BASE, LLAMA3, "llama3")
    query, key = query_and_key(3)
    assert not rope(torch.arange(3), query, key)[0].is_meta


@pytest.mark.parametrize("rotary_dim", (0, -2, 3, HEAD + 2))
def test_an_odd_or_too_large_rotary_size_is_refused(rotary_dim):
    with pytest.raises(ConfigError) as caught:
        get_rope(HEAD, rotary_dim, MAX_POSITION, BASE)
    assert caught.value.code == "rope-dim" and str(rotary_dim) in str(caught.value)


@pytest.mark.parametrize(
    "rope_type, settings, code, word",
    (
        ("spiral", {}, "rope-type", "spiral"),
        ("longrope", {}, "config-missing-setting", "original_max_position_embeddings"),
        ("longrope", LONG | {"long_factor": [1.0]}, "config-value", "longrope"),
        ("longrope", LONG | {"short_factor": [0.0] * (HEAD // 2)}, "config-value", "longrope"),
        ("linear", {}, "config-missing-setting", "factor"),
        ("dynamic", {}, "config-missing-setting", "factor"),
        ("llama3", {"factor": 8.0}, "config-missing-setting", "original_max_position_embeddings"),
        ("linear", {"factor": 0}, "config-value", "linear"),
        ("llama3", LLAMA3 | {"low_freq_factor": 0}, "config-value", "llama3"),
    ),
)
def test_settings_that_cannot_be_used_are_named(rope_type, settings, code, word):
    with pytest.raises(ConfigError) as caught:
        get_rope(HEAD, HEAD, MAX_POSITION, BASE, settings, rope_type)
    assert caught.value.code == code and word in str(caught.value)
