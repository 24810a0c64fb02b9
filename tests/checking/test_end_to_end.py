"""Divergence and perplexity against transformers on the same tokens; comparisons of rules."""

from __future__ import annotations

import json
import math
import shutil
import sys

import pytest
import torch

import pymllm
from pymllm.api import shipped_model
from pymllm.checking.compare import Comparison
from pymllm.cli import main
from pymllm.errors import ConfigError, MissingExtraError
from pymllm.text.tokenizer import Tokenizer

from ..checkpoints import write_checkpoint

TEXT = "".join(f"x{n} = [y * {n} for y in range({n % 9})]\n" for n in range(60))
WINDOW = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny llama with the shipped model's tokenizer."""
    there = write_checkpoint(tmp_path_factory.mktemp("model"), "llama", "none", vocab_size=4096)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped_model() / file, there.folder)
    (there.folder / "text.txt").write_text(TEXT)
    return there


def windows(model) -> list[torch.Tensor]:
    ids = Tokenizer(model.folder).encode(TEXT)
    last = len(ids) - WINDOW
    return [torch.tensor(ids[last * i // 3 : last * i // 3 + WINDOW]) for i in range(4)]


def test_perplexity_and_divergence_are_those_of_transformers_logits(model):
    rules = {"**.layers.**": "int4:group_size=32"}
    found = pymllm.verify(
        model.folder, rules, text=model.folder / "text.txt", tokens=4 * WINDOW, window=WINDOW, dtype="float32"
    ).end_to_end
    assert (found.tokens, found.windows) == (4 * WINDOW, 4)
    llm = pymllm.LLM(model.folder, rules, dtype="float32", progress=False)
    losses = {"model": 0.0, "stored": 0.0}
    divergences, same = [], []
    for ids in windows(model):
        with torch.no_grad():
            expected = model.logits(ids).double()
        ours = llm.logits(ids).double()
        for name, logits in (("model", ours), ("stored", expected)):
            losses[name] += float(torch.nn.functional.nll_loss(logits[:-1].log_softmax(-1), ids[1:]))
        p, q = expected.softmax(-1), ours.softmax(-1)
        divergences.append((p * (p / q).log()).sum(-1))
        same.append(expected.argmax(-1) == ours.argmax(-1))
    for name, loss in losses.items():
        assert found.perplexity[name] == pytest.approx(math.exp(loss / 4), rel=1e-3)
    assert found.rules.kl == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-2)
    assert found.rules.worst_kl == pytest.approx(float(torch.cat(divergences).max()), rel=1e-2)
    assert found.rules.top1 == pytest.approx(float(torch.cat(same).float().mean()), abs=0.01)
    assert found.kernels.kl < 1e-6 < found.rules.kl  # exact arithmetic changes nothing, int4 does
    assert found.perplexity["float32"] == pytest.approx(found.perplexity["model"], rel=1e-4)


def test_lower_precision_shows_in_the_kernels_divergence(model):
    exact, rounded = (
        pymllm.verify(model.folder, end_to_end=True, tokens=128, dtype=dtype).end_to_end
        for dtype in ("float32", "bfloat16")
    )
    assert exact.rules is None and exact.text is None and exact.perplexity == {}
    assert exact.kernels.kl < 1e-7 and exact.kernels.top1 == 1
    assert 1e-6 < rounded.kernels.kl < 0.05


def test_a_model_that_is_loaded_already_has_no_second_one_to_compare_with(model):
    loaded = pymllm.load_model(model.folder)
    with pytest.raises(ConfigError, match="verify takes"):
        pymllm.verify(loaded, end_to_end=True)


CANDIDATES = ["", "**.layers.**=int8", "**.mlp.**=int4:group_size=32 ; **.self_attn.**=fp8"]


@pytest.fixture(scope="module")
def comparison(model) -> Comparison:
    return pymllm.compare(model.folder, CANDIDATES, text=model.folder / "text.txt", tokens=128, window=WINDOW)


def test_a_comparison_has_bytes_and_errors_of_every_layer(model, comparison):
    stored, int8, mixed = comparison.candidates
    assert comparison.ok and [len(c.rules) for c in comparison.candidates] == [0, 1, 2]
    for candidate in comparison.candidates:
        plan = pymllm.plan(model.folder, candidate.rules)
        assert candidate.weight_bytes == plan.totals["weight_bytes"]
        planned = sum(layer.bytes for layer in plan.layers)
        assert sum(layer.bytes for layer in candidate.layers) == planned
    assert stored.end_to_end.rules is None
    assert int8.end_to_end.rules.kl < mixed.end_to_end.rules.kl
    errors = {layer.prefix: layer.error for layer in mixed.layers}
    assert 0.05 < errors["model.layers.0.mlp.down_proj"] < 0.15
    assert 0.01 < errors["model.layers.1.self_attn.o_proj"] < 0.04
    assert errors["model.embed_tokens"] == 0


def test_a_comparison_is_a_table_a_plot_and_json(comparison, tmp_path):
    lines = comparison.table().splitlines()
    assert len(lines) == 4 and lines[1].endswith("A: as stored") and "perplexity" in lines[0]
    by_size = sorted(c.weight_bytes for c in comparison.candidates)
    assert [row[1] for row in comparison.rows()] == [f"{size / 1e6:.1f} MB" for size in by_size]
    best = [c["name"] for c in comparison.to_dict()["candidates"] if c["best"]]
    sizes = {c.name: (c.weight_bytes, c.kl) for c in comparison.candidates}
    for name, (size, kl) in sizes.items():
        beaten = any(s <= size and k <= kl and (s, k) != (size, kl) for s, k in sizes.values())
        assert (name in best) is not beaten
    assert all(f"{title}:" in str(comparison) for title in ("KL", "top 1", "perplexity", "*", "kB", "error"))
    first = comparison.layer_table(2).splitlines()
    assert len(first) == 3 and "mlp" in first[1]  # the largest errors first
    assert json.loads(json.dumps(comparison.to_dict()))["schema_version"] == 1
    pytest.importorskip("matplotlib")
    comparison.save_plot(tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert drawn.count("<svg") == 1 and all(f"{letter}: " in drawn for letter in "ABC")  # a point a candidate
    with pytest.raises(ConfigError, match="plot"):
        comparison.save_plot(tmp_path / "plot.nothing")


def test_a_plot_without_matplotlib_names_the_extra_before_anything_runs(model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["verify", str(model.folder), "--compare", "", "--plot", "plot.svg"]
    assert main(arguments) == 1
    assert "pip install 'matplotlib>=" in capsys.readouterr().err
    with pytest.raises(MissingExtraError):
        Comparison("m", []).save_plot("plot.svg")


def test_the_command_prints_both(model, capsys):
    common = [str(model.folder), "--tokens", "64", "--window", "32", "--json"]
    assert (
        main(["verify", *common, "--text", str(model.folder / "text.txt"), "--quant", "**.mlp.**=int8"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["end_to_end"]["tokens"] == 64 and set(found["end_to_end"]["perplexity"]) == {
        "model",
        "float32",
        "stored",
    }
    assert main(["verify", *common, "--compare", "", "lm_head=int8"]) == 0
    assert [c["name"] for c in json.loads(capsys.readouterr().out)["candidates"]] == ["", "lm_head=int8"]
    assert main(["verify", *common, "--compare", "", "--quant", "lm_head=int8"]) == 2
    assert main(["verify", str(model.folder), "--text", "no/such/file"]) == 1
    assert "cannot be read" in capsys.readouterr().err
