"""The metadata's properties, the hook that layers fetch it through, and the warm-up flag."""

from __future__ import annotations

import pytest
import torch

from pymllm.attention import (
    AttnMetaDataBase,
    fetch_attn_metadata,
    is_warming_up,
    reset_warming_up,
    set_fetch_fn_for_attn_metadata,
    set_warming_up,
)
from pymllm.errors import ConfigError


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "is_prefill, has, every",
    (
        (True, True, True),
        (False, False, False),
        ([True, False], True, False),
        ([True, True], True, True),
        ([False, False], False, False),
        ([], False, False),
    ),
)
def test_which_requests_read_their_prompts(is_prefill, has, every):
    metadata = AttnMetaDataBase(is_prefill=is_prefill)
    assert (metadata.has_prefill, metadata.all_prefill) == (has, every)


def test_requests_are_counted_and_slots_asked_for():
    assert AttnMetaDataBase().num_reqs == 0
    assert AttnMetaDataBase(cu_seqlens_q=int32(0, 3, 4)).num_reqs == 2
    assert not AttnMetaDataBase().need_kv_cache_store
    assert not AttnMetaDataBase(slot_mapping=torch.tensor([], dtype=torch.int64)).need_kv_cache_store
    assert AttnMetaDataBase(slot_mapping=torch.tensor([-1])).need_kv_cache_store


def test_the_contracts_fields_have_defaults():
    metadata = AttnMetaDataBase()
    for name in (
        "cu_seqlens_q",
        "cu_seqlens_k",
        "slot_mapping",
        "context_lens",
        "page_tables",
        "status_table",
    ):
        assert getattr(metadata, name) is None
    assert (metadata.max_seqlen_q, metadata.max_seqlen_k, metadata.block_size) == (0, 0, 1)
    assert (metadata.page_size, metadata.kv_cache_layout, metadata.enforce_eager) == (16, "unified", True)
    assert metadata.prefix_causal and not metadata.mask_prefix_hole and metadata.causal


def test_a_layout_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match="'distinct'"):
        AttnMetaDataBase(kv_cache_layout="distinct")


def test_lengths_on_the_host_are_read_from_tensors_unless_given():
    tensors = {"cu_seqlens_q": int32(0, 3, 4), "context_lens": int32(3, 9)}
    assert AttnMetaDataBase(**tensors).spans == [(0, 3, 3), (3, 4, 9)]
    given = AttnMetaDataBase(
        cu_seqlens_q=torch.empty(3, device="meta"),
        context_lens=torch.empty(2, device="meta"),
        query_starts=[0, 3, 4],
        lengths=[3, 9],
    )
    assert given.spans == [(0, 3, 3), (3, 4, 9)]  # no number was read from a tensor


def test_every_token_knows_its_requests_length():
    mixed = AttnMetaDataBase(cu_seqlens_q=int32(0, 3, 3, 4), context_lens=int32(3, 5, 9), max_seqlen_q=3)
    assert mixed.token_lengths.tolist() == [3, 3, 3, 9]
    decoding = AttnMetaDataBase(cu_seqlens_q=int32(0, 1, 2), context_lens=int32(3, 9), max_seqlen_q=1)
    assert decoding.token_lengths.tolist() == [3, 9]


def test_what_is_made_once_a_step_is_not_made_again():
    metadata, made = AttnMetaDataBase(), []
    for _ in range(3):
        assert metadata.once("key", lambda: made.append(1) or "value") == "value"
    assert made == [1]
    assert AttnMetaDataBase().once("key", lambda: "another") == "another"


def test_layers_fetch_what_was_installed_last():
    first, second = AttnMetaDataBase(), AttnMetaDataBase()
    set_fetch_fn_for_attn_metadata(lambda: first)
    assert fetch_attn_metadata() is first
    set_fetch_fn_for_attn_metadata(lambda: second)
    assert fetch_attn_metadata() is second


def test_without_a_fetch_function_the_error_says_who_should_have_set_it():
    set_fetch_fn_for_attn_metadata(None)
    with pytest.raises(ConfigError, match=r"runner must call set_fetch_fn_for_attn_metadata"):
        fetch_attn_metadata()


def test_warming_up_is_said_and_taken_back():
    assert not is_warming_up()
    set_warming_up()
    assert is_warming_up()
    set_warming_up(False)
    assert not is_warming_up()
    set_warming_up(True)
    reset_warming_up()
    assert not is_warming_up()
