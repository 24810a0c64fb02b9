"""One, two and four ranks, simulated by threads, give the same logits; each reads only its share of the bytes."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from pymllm.api import load_model
from pymllm.loading.prepare import prepare
from pymllm.parallel import Parallel, simulate
from pymllm.planning.make_plan import make_plan

from ..checkpoints import FAMILIES, relative_error, write_checkpoint
from ..forward import logits_of

# The ranks' partial sums are added in another order: float32, measured below 1e-6.
TOLERANCE = 1e-5
FORMATS = (
    "none",
    "awq-g32",
    "awq-g64-sym",
    "awq-row",
    "fp8-block",
    "fp8-tensor-static",
    "ct-channel",
    "ct-block",
)


def ranks_logits(folder, ids, size, **options):
    """The logits of every rank."""
    return simulate(
        size, lambda _: logits_of(load_model(folder, device="cpu", dtype="float32", **options), ids)
    )


def assert_all_ranks_equal(checkpoint, sizes=(1, 2, 4), **options):
    for size in sizes:
        for rank, logits in enumerate(ranks_logits(checkpoint.folder, checkpoint.ids, size, **options)):
            assert relative_error(logits, checkpoint.logits()) <= TOLERANCE, f"rank {rank} of {size}"


@pytest.mark.parametrize("fmt", FORMATS)
def test_logits_are_those_of_one_rank(tmp_path, fmt):
    """With two key heads: four ranks replicate each; a vocabulary of 97 that no number of ranks divides."""
    assert_all_ranks_equal(write_checkpoint(tmp_path / "m", "llama", fmt))


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"llama"}))
@pytest.mark.parametrize("fmt", ("none", "awq-g32", "fp8-block"))
def test_every_family_shards(tmp_path, family, fmt):
    """Biases, norms of heads, and tensors that hold q, k and v side by side included."""
    assert_all_ranks_equal(write_checkpoint(tmp_path / "m", family, fmt), sizes=(2, 4))


@pytest.mark.parametrize("kv_heads", (1, 2, 4))
@pytest.mark.parametrize("fmt", ("none", "awq-g32", "fp8-block", "fp8-block-64x32"))
def test_key_heads_are_replicated_where_ranks_are_more(tmp_path, kv_heads, fmt):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", fmt, num_key_value_heads=kv_heads)
    assert_all_ranks_equal(checkpoint, sizes=(2, 4))


@pytest.mark.parametrize("vocab", (96, 97, 98, 5))
@pytest.mark.parametrize("tied", (False, True))
def test_any_vocabulary_is_padded(tmp_path, vocab, tied):
    """Of five rows, three ranks of four have two, two and one, and the last none."""
    checkpoint = write_checkpoint(
        tmp_path / "m", "llama", "awq-g64", num_hidden_layers=1, vocab_size=vocab, tie_word_embeddings=tied
    )
    assert checkpoint.logits().shape == (24, vocab)
    assert_all_ranks_equal(checkpoint)


def test_biases_of_row_parallel_layers_are_added_once(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", attention_bias=True, mlp_bias=True)
    assert_all_ranks_equal(checkpoint)


@pytest.mark.parametrize("rules", ("**.mlp.gate_proj=fp8:granularity=tensor", "**=none", "**.mlp.**=fp8"))
def test_rules_convert_a_shard_as_they_convert_the_layer(tmp_path, rules):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", "awq-g32")
    (alone,) = ranks_logits(checkpoint.folder, checkpoint.ids, 1, quant=rules)
    for logits in ranks_logits(checkpoint.folder, checkpoint.ids, 2, quant=rules):
        # Channels of row-parallel layers are divided, so that their scales are chosen for each half.
        assert relative_error(logits, alone) <= (TOLERANCE if "none" in rules else 0.1)


def test_only_rank_zero_gets_logits_unless_all_ask(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", num_hidden_layers=1)
    hidden = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))

    def work(_):
        head = load_model(checkpoint.folder, device="cpu").lm_head
        return head(hidden), head(hidden, gather_all=True)

    (first, first_all), (second, second_all) = simulate(2, work)
    assert second is None and torch.equal(first, first_all) and torch.equal(first, second_all)


@pytest.fixture
def bytes_of_threads(monkeypatch):
    """Bytes read from files so far, by thread."""
    counts: dict[int, int] = {}
    real = os.preadv

    def counting(*args):
        count = real(*args)
        counts[threading.get_ident()] = counts.get(threading.get_ident(), 0) + count
        return count

    monkeypatch.setattr(os, "preadv", counting)
    return counts


@pytest.mark.parametrize("fmt", ("none", "awq-g32", "fp8-block"))
@pytest.mark.parametrize("size", (2, 4))
def test_each_rank_reads_only_its_share(tmp_path, bytes_of_threads, monkeypatch, fmt, size):
    # Each rank is a thread here, whose reads are counted: none of them goes to another thread.
    monkeypatch.setattr("pymllm.loading.reading.WORTH_A_THREAD", 1 << 60)
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 16384,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    checkpoint = write_checkpoint(tmp_path / "m", "llama", fmt, num_hidden_layers=1, head_dim=64, **sizes)
    tensors = checkpoint.tensors
    whole = sum(tensor.nbytes for tensor in tensors.values())
    norms = sum(tensor.nbytes for name, tensor in tensors.items() if "norm" in name)
    header = checkpoint.folder.joinpath("model.safetensors").stat().st_size - whole
    # Where a rank's part of a row is less than a page, whole rows are read: from a disk that is no more.
    cut_in_rows = (
        ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") if "awq" in fmt else ("o_proj", "down_proj")
    )
    narrow = sum(
        tensor.nbytes
        for name, tensor in tensors.items()
        if name.split(".")[-2] in cut_in_rows and tensor.ndim == 2 and tensor[0].nbytes // size < 4096
    )
    bytes_of_threads.clear()  # what was read above

    def work(_):
        report = load_model(checkpoint.folder, device="cpu", dtype="float32").load_report
        return report.bytes_read, bytes_of_threads[threading.get_ident()]

    for claimed, actual in simulate(size, work):
        # Norms are whole everywhere; the padded vocabulary and shared groups add a little.
        assert whole / size <= claimed + norms and claimed <= whole / size + norms + 100_000
        assert claimed <= actual <= claimed + narrow + header + 20_000


def test_the_plan_of_a_rank_is_what_it_loads(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", "awq-g32")

    def work(_):
        prepared = prepare(checkpoint.folder, device="cpu")
        planned = sum(layer.bytes for layer in make_plan(prepared).layers)
        return planned, load_model(checkpoint.folder, device="cpu").load_report.final_bytes

    norms = sum(tensor.nbytes for name, tensor in checkpoint.tensors.items() if "norm" in name)
    for planned, loaded in simulate(4, work):
        assert planned <= loaded <= planned + norms


def test_a_rank_without_a_group_can_load_but_not_run(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", num_hidden_layers=1)
    with Parallel(1, 2):
        model = load_model(checkpoint.folder, device="cpu")
    with pytest.raises(ValueError, match="no group"):
        logits_of(model, checkpoint.ids)


def test_a_failure_in_one_rank_ends_all_and_is_raised():
    def work(parallel):
        if parallel.rank == 1:
            raise RuntimeError("rank 1 fails")
        parallel.all_reduce(torch.ones(1))

    with pytest.raises(RuntimeError, match="rank 1 fails"):
        simulate(3, work)
