"""The sizing table's bytes, beside the formula for a decoder's parameters, and the number of GPUs that follows."""

from __future__ import annotations

import importlib.util

import pytest

from tests.processes import ROOT


@pytest.fixture(scope="module")
def sizing():
    spec = importlib.util.spec_from_file_location("sizing", ROOT / "benchmarks" / "sizing.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# H hidden, F of the MLP, L layers, A query heads, K heads of keys and values, D of a head, V words
H, F, L, A, K, V = 256, 512, 2, 8, 4, 1000
D = H // A
CONFIG = {
    **{"hidden_size": H, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": A},
    **{
        "num_key_value_heads": K,
        "vocab_size": V,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
}
LINEAR = L * (H * H + 2 * H * K * D + H * H + 3 * H * F)
PARAMETERS = LINEAR + 2 * V * H + (2 * L + 1) * H
TOKEN = 2 * L * K * D * 2  # keys and values, two bytes each


@pytest.mark.parametrize("method", ["as stored", "int4, KV fp8"])
def test_bytes_are_those_of_the_formula(sizing, tmp_path, method):
    sizing.write_headers(tmp_path, CONFIG)
    row = sizing.row(tmp_path, "tiny", method, 1e12, 1, 8192)
    assert row["kv_bytes_per_token"] == (TOKEN if method == "as stored" else TOKEN // 2)
    assert row["kv_bytes_by_context"] == {
        "8192": 8192 * row["kv_bytes_per_token"],
        "32768": None,
        "131072": None,
    }
    assert row["gpus"] == 1
    if method == "as stored":
        assert row["weight_bytes"] == 2 * PARAMETERS
    else:
        # Half a byte each, and for 64 of them a scale and a zero point of at most four bytes.
        rest = 2 * (PARAMETERS - LINEAR)
        assert LINEAR / 2 < row["weight_bytes"] - rest <= LINEAR / 2 + LINEAR / 64 * 4


@pytest.mark.parametrize(("requests", "gpus"), [(1, 1), (2, 2), (4, 4), (9, None)])
def test_gpus_are_the_fewest_whose_ranks_hold_their_share(sizing, tmp_path, requests, gpus):
    sizing.write_headers(tmp_path, CONFIG)
    cache = TOKEN * 8192
    # One GPU holds all weights and the cache of one request, and a little more. Ranks beyond the four heads of keys and
    # values hold copies of them: no number of GPUs holds nine requests.
    memory = 2 * PARAMETERS + 1.01 * cache
    assert sizing.row(tmp_path, "tiny", "as stored", memory, requests, 8192)["gpus"] == gpus
