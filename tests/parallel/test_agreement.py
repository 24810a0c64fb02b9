"""Ranks that would load different things are refused, on all sides, with what differs, before a tensor is read."""

from __future__ import annotations

import shutil

import pytest
import torch

import pymllm
from pymllm.errors import PymllmError, RankError
from pymllm.follower import _change_adapter
from pymllm.loading.agreement import compare, describe_adapter
from pymllm.loading.load import load_prepared
from pymllm.parallel import simulate

from ..adapters.handwritten import random_adapter
from ..checkpoints import edit_config, load_tensors, save_tensors, write_checkpoint


def refusals(monkeypatch, ask, size=2):
    """What each rank is told; none gets as far as reading."""
    read = []
    monkeypatch.setattr(
        "pymllm.api.llm.load_prepared", lambda *a, **k: read.append(1) or load_prepared(*a, **k)
    )

    def work(parallel):
        try:
            ask(parallel.rank)
        except PymllmError as error:
            return f"{error.code}: {error}"

    found = simulate(size, work)
    assert not read
    return found


@pytest.fixture
def folders(tmp_path):
    """The same checkpoint twice."""
    write_checkpoint(tmp_path / "0", "llama", "awq-g32")
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    return [tmp_path / "0", tmp_path / "1"]


def other_values(folder, _):
    """One number of one tensor: shapes, sizes and headers stay."""
    tensors = load_tensors(folder)
    name = next(name for name in tensors if name.endswith("norm.weight"))
    tensors[name] = tensors[name].clone()
    tensors[name][0] += 1
    save_tensors(folder, tensors)


def other_config(folder, _):
    edit_config(folder, rms_norm_eps=0.5)


def other_ends(folder, _):
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')


OPTIONS = {
    "the rules (--quant)": {"quant": {"**.mlp.**": "int8"}},
    "the dtype (--dtype)": {"dtype": "bfloat16"},
    "the KV cache's rules (--kv-cache)": {"kv_cache": "fp8"},
    "the kernels (--kernel)": {"kernels": {"linear": "reference"}},
    "the strategy (--strategy)": {"strategy": "prompt_lookup"},
    "the definition (--definition)": {"definition": "transformers"},
}


@pytest.mark.parametrize("what", OPTIONS)
def test_options(monkeypatch, folders, what):
    def ask(rank):
        options = {"dtype": "float32", **(OPTIONS[what] if rank else {})}
        pymllm.load_model(folders[0], device="cpu", **options)

    for said in refusals(monkeypatch, ask):
        assert said.startswith("ranks-disagree") and f"{what}: rank 0 has" in said and "rank 1 has" in said


@pytest.mark.parametrize(
    "change, what",
    (
        (other_values, "the file model.safetensors"),
        (other_config, "the config"),
        (other_ends, "the file generation_config.json"),
    ),
)
def test_files(monkeypatch, folders, change, what):
    change(folders[1], None)
    for said in refusals(monkeypatch, lambda rank: pymllm.load_model(folders[rank], device="cpu")):
        assert said.startswith("ranks-disagree") and f"{what}: rank 0 has" in said


def test_an_error_of_one_rank_is_told_to_all(monkeypatch, folders):
    (folders[1] / "model.safetensors").write_bytes(b"not a checkpoint")
    first, second = refusals(monkeypatch, lambda rank: pymllm.load_model(folders[rank], device="cpu"))
    assert first.startswith("rank-failed: rank 1 of 2 cannot load:") and "model.safetensors" in first
    assert not second.startswith("rank-failed") and "model.safetensors" in second


def test_adapters(monkeypatch, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", "llama")
    for seed in range(2):
        random_adapter(tmp_path / f"a{seed}", checkpoint, ("q_proj",), seed=seed)

    def ask(rank):
        pymllm.LLM(checkpoint.folder, device="cpu", adapters={"a": tmp_path / f"a{rank}"})

    for said in refusals(monkeypatch, ask):
        assert said.startswith("ranks-disagree") and "the adapter a: rank 0 has" in said


def test_versions_and_what_one_side_lacks_are_named_with_the_rank():
    same = {"torch's version": torch.__version__, "the file a": "1"}
    compare([same, dict(same)])
    with pytest.raises(
        PymllmError, match=r"torch's version: rank 0 has .*, and rank 2 has 2.0; the file a: "
    ):
        compare([same, same, {"torch's version": "2.0"}])


def test_adapters_that_are_loaded_at_run_time(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", num_hidden_layers=1)
    for rank in range(2):
        random_adapter(tmp_path / f"{rank}", checkpoint, ("q_proj",), seed=rank)

    def work(parallel):
        llm = pymllm.LLM(checkpoint.folder, device="cpu", dtype="float32")
        llm.load_adapter("same", tmp_path / "0")
        with pytest.raises(RankError, match=r"the adapter differs: rank 0 has sha256 .*, and rank 1 has"):
            llm.load_adapter("other", tmp_path / f"{parallel.rank}")
        message = {"how": "load_adapter", "arguments": ["other", str(tmp_path / "1")]}
        assert "this rank" in _change_adapter(llm, {**message, "files": describe_adapter(tmp_path / "0")})

    simulate(2, work)


def test_what_requests_may_have_is_said_by_rank_0(folders):
    options = {"max_model_len": 48, "prefix_reuse": True}, {"max_model_len": 16, "prefix_reuse": False}

    def work(parallel):
        llm = pymllm.LLM(folders[0], device="cpu", dtype="float32", **options[parallel.rank])
        params = pymllm.SamplingParams(temperature=0, max_tokens=99, ignore_eos=True)
        return [
            [output.token_ids for output in llm.generate([[1, 2, 3, 4, 5] * 4] * 2, params)] for _ in range(2)
        ]

    first, second = simulate(2, work)
    assert first == second and {len(each) for answers in first for each in answers} == {28}
