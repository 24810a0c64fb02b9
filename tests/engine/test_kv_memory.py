"""The size of the KV cache: what decides it, what is refused, and that memory is committed as it is used."""

from __future__ import annotations

import os
import sys

import pytest
import torch

import pymllm
from pymllm import LLM
from pymllm.api import shipped_model
from pymllm.engine.kv_memory import choose_cache_size, read_size
from pymllm.errors import ConfigError, RequestError
from pymllm.quantization.kv_cache import zeros

from ..checkpoints import write_checkpoint
from .answers import greedy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("2GB", 2 * 10**9),
        ("2 gb", 2 * 10**9),
        ("1.5G", 15 * 10**8),
        ("512MiB", 512 << 20),
        ("3Ki", 3072),
        (" 7kB ", 7000),
    ],
)
def test_sizes_are_read_in_thousands_or_in_1024s(text, expected):
    assert read_size(text) == expected


@pytest.mark.parametrize(
    "text", ("", "GB", "2TB", "-1", "0", 0, -5, 1.5, True, None, "1e9", "two", "2GB/s", "0.1")
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match=r"no size of memory.*'512MiB'"):
        read_size(text)


def chosen(longest=4096, token_bytes=1000, available=None, **limits):
    size = choose_cache_size(longest, token_bytes, available, **limits)
    assert size.tokens == size.pages * 16 and size.bytes == size.tokens * token_bytes
    return size.tokens, size.max_model_len


def test_by_default_it_holds_16384_tokens_or_the_longest_request_within_a_quarter_of_what_is_free():
    assert chosen(available=10**12) == (16384, 4096)
    assert chosen(40_000, available=10**12) == (40_000, 40_000)
    assert chosen(40_001, available=10**12) == (40_016, 40_001)
    assert chosen(40_000, available=8_000_000) == (2000, 2000)
    assert chosen(1024, available=8_000_000) == (2000, 1024)
    assert chosen(10**9, available=None) == ((1 << 30) // 16_000 * 16,) * 2
    assert chosen(available=0) == (16, 16)
    assert chosen(512, token_bytes=0, available=0) == (16384, 512)


def test_on_a_gpu_it_takes_nine_tenths_of_what_steps_leave_or_what_64_longest_requests_need():
    gpu = {"on_gpu": True}
    assert chosen(available=10**12, **gpu) == (64 * 4096, 4096)
    assert chosen(available=10**12, working=10**11, max_model_len=100, **gpu) == (64 * 100, 100)
    assert chosen(available=100_000_000, working=20_000_000, **gpu) == (72_000, 4096)
    assert chosen(10**6, available=100_000_000, working=20_000_000, **gpu) == (72_000, 72_000)
    assert chosen(available=20_000_000, working=30_000_000, **gpu) == (16, 16)
    size = choose_cache_size(4096, 1000, 10**8, working=2 * 10**7, **gpu)
    assert size.decided_by == "90% of the GPU's memory that weights and steps leave free"
    assert choose_cache_size(4096, 1, 10**9, **gpu).decided_by == "64 requests of the longest context"


def test_on_a_gpu_a_share_is_of_what_is_free_beside_the_weights_as_far_as_steps_leave_it():
    free = {"available": 100_000_000, "working": 20_000_000, "on_gpu": True}
    assert chosen(kv_memory="30%", **free) == (30_000, 4096)
    assert chosen(kv_memory="80%", **free) == chosen(kv_memory="100%", **free) == (80_000, 4096)
    size = choose_cache_size(4096, 1000, kv_memory="100%", **free)
    assert size.decided_by.endswith("less 20.00 MB that steps take")
    assert chosen(kv_memory="80MB", **free) == (80_000, 4096)
    with pytest.raises(ConfigError, match=r"at most 80.00 MB: 100.00 MB are free, and steps take 20.00 MB"):
        chosen(kv_memory="80.1MB", **free)
    with pytest.raises(ConfigError, match=r"4096 tokens of 20000 bytes: 81.92 MB"):
        chosen(token_bytes=20_000, max_model_len=4096, **free)


def test_a_gpu_whose_memory_nobody_knows_is_taken_to_hold_what_is_asked_for():
    size = choose_cache_size(10**7, 1000, None, on_gpu=True, working=10**12)
    assert size.bytes == (4 << 30) * 9 // 10 // 16_000 * 16_000
    assert size.decided_by == "90% of 4.29 GB, as the memory of that GPU is not known here"
    assert chosen(10**7, available=None, on_gpu=True, max_model_len=10**7)[1] == 10**7
    assert chosen(10**7, available=None, on_gpu=True, max_model_len=10**7, state_bytes=10**9)[1] == 10**7
    assert chosen(10**7, available=None, on_gpu=True, kv_memory="32MB") == (32_000, 32_000)


def test_asked_for_it_is_what_was_asked_for():
    assert chosen(available=0, kv_memory=320_000) == (320, 320)
    assert chosen(available=0, kv_memory="5MB") == (4992, 4096)
    assert chosen(available=10**12, max_model_len=100) == (16384, 100)
    assert chosen(available=8_000_000, max_model_len=2000) == (2000, 2000)
    assert chosen(available=0, max_model_len=320, kv_memory=320_000) == (320, 320)


@pytest.mark.parametrize(
    ("limits", "numbers"),
    [
        (
            {"max_model_len": 2001, "available": 8_000_000},
            ("2000 tokens, as 2.00 MB", "2001 tokens", "2.02 MB"),
        ),
        (
            {"max_model_len": 330, "kv_memory": 320_000},
            ("320 tokens, as 0.32 MB", "(kv_memory)", "330 tokens"),
        ),
        ({"kv_memory": 15_999}, ("at most 0 tokens", "1000 bytes")),
        ({"available": 0, "max_model_len": 1}, ("at most 0 tokens", "25%")),
        ({"max_model_len": 4097}, ("1 to 4096", "4097")),
        ({"max_model_len": 0}, ("1 to 4096", "found 0")),
        ({"max_model_len": True}, ("1 to 4096", "True")),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers(limits, numbers):
    with pytest.raises(ConfigError) as refused:
        chosen(**limits)
    assert all(number in str(refused.value) for number in numbers), str(refused.value)


@pytest.mark.parametrize(
    "asked, most, tokens",
    [
        ({}, 4092, 16384),
        ({"max_model_len": 50}, 50, 16384),
        ({"max_model_len": 32, "kv_memory": 48_000}, 32, 48),  # 33 tokens, in three pages
        ({"kv_memory": 48_000}, 44, 48),
    ],
)
def test_a_request_s_last_block_has_room(asked, most, tokens):
    size = chosen(block_length=11, **asked)
    assert size == (tokens, most)


@pytest.mark.parametrize(
    "limits, numbers",
    [
        ({"max_model_len": 32, "kv_memory": 47_000}, ("at most 32 tokens", "0.05 MB")),
        ({"max_model_len": 4093}, ("1 to 4092", "whole blocks of 11", "4093")),
        ({"kv_memory": 32_000, "block_length": 33}, ("at most 32 tokens",)),
        ({"block_length": 4097}, ("1 to 4096", "4097")),
    ],
)
def test_a_block_for_which_there_is_no_room_is_refused(limits, numbers):
    with pytest.raises(ConfigError) as refused:
        chosen(**{"block_length": 11, **limits})
    assert all(number in str(refused.value) for number in numbers), str(refused.value)


def test_a_model_runs_within_what_its_plan_says(tmp_path):
    write_checkpoint(tmp_path)
    limits = {"max_model_len": 50, "kv_memory": "1MB"}
    llm = LLM(tmp_path, **limits)
    size = llm.plan.kv_cache
    assert size == pymllm.plan(tmp_path, **limits).kv_cache and size["max_model_len"] == 50
    cache = llm.engine.cache
    held = sum(layer.cache.nbytes for layer in cache.layers)
    assert held == size["bytes"] <= 10**6 < held + 16 * llm.plan.totals["kv_cache_bytes_per_token"]
    assert cache.num_pages * 16 == size["tokens"]
    (output,) = llm.generate([[1] * 40], greedy(20))
    assert len(output.token_ids) == 10 and output.finish_reason == "length"
    with pytest.raises(RequestError, match="fewer than 50 tokens"):
        llm.generate([[1] * 50], greedy(1))


def test_a_swap_leaves_the_plan_its_cache():
    llm = LLM(max_model_len=77)
    with pymllm.swap(llm, "**.mlp.**", "int8"):
        assert llm.plan.kv_cache["max_model_len"] == 77


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "float16"),
        ({"kv_cache": "none"}, "float16"),
        ({"compute": "exact"}, "float32"),
        ({"dtype": "float32"}, "float32"),
        ({"kv_cache": "float32"}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_keys_and_values_have_the_checkpoint_s_bits_unless_more_were_asked_for(options, expected):
    planned = pymllm.plan(shipped_model(), device="cpu", **options)
    assert {row.method_detail for row in planned.layers if row.kind == "attention"} == {
        f"KV cache in {expected}"
    }
    assert planned.totals["kv_cache_bytes_per_token"] == 6 * 2 * 2 * 64 * getattr(torch, expected).itemsize


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn))
def test_pages_take_memory_once_they_are_used(dtype):
    before = resident()
    pages = zeros((1 << 14, 16, 8, 128), dtype, torch.device("cpu"))
    assert pages.nbytes >= 256 << 20 and pages.data_ptr() % 64 == 0
    assert resident() - before < 32 << 20
    assert not bool(pages[[0, 77, -1]].view(torch.uint8).any())
    pages[:1024].view(torch.uint8).fill_(1)
    assert (16 << 20) <= resident() - before < (96 << 20)
