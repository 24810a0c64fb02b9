"""`search_rules`: estimates beside the true divergence, budgets, resumption, and rules that every reader takes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import pymllm
from pymllm.api import shipped_model
from pymllm.cli import main
from pymllm.errors import ConfigError
from pymllm.loading.prepare import prepare
from pymllm.searching import journal, search
from pymllm.searching.methods import read_methods, stored_bits
from pymllm.searching.weights import list_weights
from pymllm.weights.spec import LinearShape, Span

from .. import moe_checkpoints
from ..checkpoints import save_tensors, write_checkpoint
from ..writing.stopping import Stop, stop_at

TEXT = "".join(f"def f{n}(x, y={n % 7}):\n    return [x * {n}, y - {n * n}]\n\n" for n in range(120))
METHODS = "int2:group_size=32,int3:group_size=64,int4:group_size=64,int8,stored"
OPTIONS = {"methods": METHODS, "tokens": 256, "held_out_tokens": 128, "window": 64, "progress": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny tied llama with the shipped model's tokenizer; its second block does little, so that it needs few bits."""
    folder = tmp_path_factory.mktemp("model")
    there = write_checkpoint(folder, "llama", "none", vocab_size=4096, tie_word_embeddings=True)
    tensors, state = there.tensors, there.model.state_dict()
    for name in tensors:
        if "embed" in name:  # else each token answers with itself, and nothing can change that
            tensors[name] *= 0.25
            state[name].copy_(tensors[name])
        if ".1." in name and ("o_proj" in name or "down_proj" in name):
            tensors[name] *= 0.05
            state[name].copy_(tensors[name])
    save_tensors(folder, tensors)
    finish(folder)
    return there


def finish(folder) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped_model() / file, folder)
    (folder / "text.txt").write_text(TEXT)


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    journal = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    result = run(model.folder, 4.0, journal)
    return result, journal


def run(folder, bits, journal, **options):
    return pymllm.search_rules(
        folder, bits, text=folder / "text.txt", journal=journal, **{**OPTIONS, **options}
    )


def test_the_budget_is_kept_and_no_uniform_choice_within_it_is_better(found):
    result, _ = found
    assert result.bits <= 4.0 and result.weights == sum(w.weights for w in result.chosen)
    assert result.bits == pytest.approx(sum(w.bits * w.weights for w in result.chosen) / result.weights)
    uniform = result.best_uniform()
    assert uniform is not None and uniform.bits <= 4.0 and result.kl < uniform.kl
    assert result.bound <= result.estimate
    assert {point.name for point in result.curve if point.uniform} == set(METHODS.split(",")) - {"stored"}


def test_the_measured_kl_is_that_of_a_model_loaded_by_the_rules(found, model, tmp_path):
    """The reference is transformers with the weights that the rules make, decoded from what loading has packed."""
    result, _ = found
    llm = pymllm.LLM(model.folder, result.rules, dtype="float32", progress=False)
    exact = pymllm.LLM(model.folder, dtype="float32", progress=False)
    windows = search._read_text(exact.prepared, model.folder / "text.txt", None, 256, 128, 64)[1]
    kls = []
    for ids in windows:
        with torch.no_grad():
            expected = model.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        got = llm.logits(list(ids)).double().log_softmax(-1)
        kls.append((expected.exp() * (expected - got)).sum(-1))
    assert result.kl == pytest.approx(float(torch.cat(kls).mean()), rel=0.02, abs=1e-7)


def test_estimates_are_near_the_true_divergence_of_one_changed_weight(model, found):
    """Computed by transformers with one rounded weight at a time, on the text of the estimates."""
    _, file = found
    known = {e["key"]: e["value"] for e in map(json.loads, file.read_text().splitlines()[1:])}
    prepared = prepare(model.folder, device="cpu", dtype="float32", compute="exact")
    windows = torch.tensor(search._read_text(prepared, model.folder / "text.txt", None, 256, 128, 64)[0])
    with torch.no_grad():
        expected = model.model(windows).logits.double().log_softmax(-1)
    state = model.model.state_dict()
    ratios = []
    for weight in list_weights(prepared, keep_fused=True)[1]:
        (method,) = read_methods(["int3:group_size=64"], torch.float32)
        kept = {layer.name: state[f"{layer.name}.weight"].clone() for layer in weight.layers}
        for name, rounded in weight.rounded(method, kept).items():
            state[f"{name}.weight"].copy_(rounded)
        with torch.no_grad():
            got = model.model(windows).logits.double().log_softmax(-1)
        for name, floats in kept.items():
            state[f"{name}.weight"].copy_(floats)
        truth = float((expected.exp() * (expected - got)).sum(-1).mean())
        ratios.append(known[f"harm {weight.name} int3:group_size=64"] / truth)
    assert len(ratios) == 9
    assert min(ratios) > 0.4 and max(ratios) < 2.0, ratios
    assert sum(0.7 < ratio < 1.4 for ratio in ratios) >= 6, ratios


def test_two_runs_give_the_same_bytes(found, model, tmp_path):
    again = run(model.folder, 4.0, tmp_path / "another.jsonl")
    assert again.rules_file == found[0].rules_file


@pytest.mark.parametrize("call", [2, 12, 44])
def test_a_run_that_was_stopped_goes_on_and_ends_alike(found, model, tmp_path, monkeypatch, call):
    file = tmp_path / "journal.jsonl"
    with monkeypatch.context() as patch:
        stop_at(patch, journal.Journal, "add", call)
        with pytest.raises(Stop):
            run(model.folder, 4.0, file)
    assert len(file.read_text().splitlines()) == call
    with file.open("a") as stream:
        stream.write('{"key": "harm half a li')  # what a killed process leaves
    assert run(model.folder, 4.0, file).rules_file == found[0].rules_file
    whole = sorted(found[1].read_text().splitlines()[1:])
    assert sorted(file.read_text().splitlines()[1:]) == whole  # nothing twice


def test_what_is_known_is_not_measured_again(found, model, monkeypatch):
    for name in ("divergences", "estimate"):
        real = getattr(search.Passes, name)
        if name == "divergences":
            monkeypatch.setattr(search.Passes, name, None)
        else:
            monkeypatch.setattr(
                search.Passes,
                name,
                lambda self, *a, _real=real: _real(self, *a),  # finds nothing to do
            )
    monkeypatch.setattr(search.Passes, "_step", None)
    assert run(model.folder, 4.0, found[1]).rules_file == found[0].rules_file


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [lines[0], "{}", *lines[1:]], "line 2 is not what a search writes"),
        (lambda lines: [*lines[:3], lines[3].replace("value", "v"), *lines[4:]], "line 4 is not"),
        (lambda lines: ["what is this", *lines[1:]], "line 1 is not"),
        (lambda lines: [lines[0].replace('"seed": 0', '"seed": 5'), *lines[1:]], "another search.*seed 5"),
    ],
)
def test_a_damaged_or_foreign_journal_is_refused_and_can_be_thrown_away(
    found, model, tmp_path, damage, message
):
    file = tmp_path / "journal.jsonl"
    file.write_text("\n".join(damage(found[1].read_text().splitlines())) + "\n")
    before = file.read_text()
    with pytest.raises(ConfigError, match=message) as caught:
        run(model.folder, 4.0, file)
    assert caught.value.code == "search-journal" and "--restart" in str(caught.value)
    assert file.read_text() == before
    assert run(model.folder, 4.0, file, restart=True, curve=False).rules == found[0].rules


def test_the_file_is_read_by_load_plan_swap_and_quantize(found, model, tmp_path):
    result, _ = found
    file = tmp_path / "rules.txt"
    file.write_text(result.rules_file)
    by_load = pymllm.LLM(model.folder, file, dtype="float32", progress=False)
    ids = list(range(7, 40))
    for layer in result.chosen:
        for name in layer.names:
            planned = pymllm.plan(model.folder, f"@{file}").layer(name)
            assert planned.method == ("none" if layer.method == "stored" else layer.method.partition(":")[0])
    by_swap = pymllm.LLM(model.folder, dtype="float32", progress=False)
    pymllm.swap(by_swap, f"@{file}")
    assert torch.equal(by_swap.logits(ids), by_load.logits(ids))
    limited = run(model.folder, 22.0, tmp_path / "journal.jsonl", format="compressed-tensors", curve=False)
    file.write_text(limited.rules_file)
    assert "compressed-tensors" in limited.writes
    pymllm.quantize_checkpoint(model.folder, tmp_path / "out", file, progress=False)
    read = pymllm.LLM(tmp_path / "out", dtype="float32", progress=False)
    loaded = pymllm.LLM(model.folder, file, dtype="float32", progress=False)
    assert (read.logits(ids) - loaded.logits(ids)).abs().max() < 0.05


def test_the_verb_prints_rules_alone_on_stdout(found, model, tmp_path, capsys, monkeypatch):
    words = ["search", str(model.folder), "--bits", "4", "--text", str(model.folder / "text.txt")]
    words += ["--tokens", "256", "--held-out-tokens", "128", "--window", "64", "--methods", METHODS]
    assert main([*words, "--journal", str(found[1])]) == 0
    printed = capsys.readouterr()
    assert printed.out == found[0].rules_file and "* searched" in printed.err
    out = tmp_path / "rules.txt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main([*words, "--out", str(out), "--json", "--no-curve"]) == 0
    assert json.loads(capsys.readouterr().out)["rules"] == found[0].rules
    assert out.read_text() == found[0].rules_file
    assert len(list((tmp_path / "cache" / "pymllm" / "search").iterdir())) == 1


@pytest.mark.parametrize(
    ("bits", "options", "code", "message"),
    [
        (1.5, {}, "search-budget", r"at least 2\.5625 bits"),
        (0, {}, "search-budget", "a number above 0"),
        (float("nan"), {}, "search-budget", "a number above 0"),
        (4, {"methods": "int4,intt8"}, "unknown-method", "int8"),
        (4, {"methods": "int4:groupsize=64"}, "unknown-option", "group_size"),
        (4, {"methods": "awq:group_size=100"}, "search-methods", "none of the methods can hold"),
        (4, {"methods": ""}, "search-methods", "no method to choose from"),
        (4, {"format": "gguff"}, "spelling", "compressed-tensors"),
        (4, {"tokens": 64, "held_out_tokens": 64}, "text", "too little text"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(model, tmp_path, bits, options, code, message):
    with pytest.raises(ConfigError, match=message) as caught:
        run(model.folder, bits, tmp_path / "journal.jsonl", **options)
    assert caught.value.code == code
    assert not (tmp_path / "journal.jsonl").exists()


def test_parts_can_be_freed(model, tmp_path):
    free = run(model.folder, 3.0, tmp_path / "journal.jsonl", keep_fused=False, curve=False)
    assert max(len(weight.names) for weight in free.chosen) == 2  # the table and its head
    assert len(free.chosen) == 1 + 2 * 7 and free.bits <= 3.0


def test_experts_of_a_layer_have_one_method_and_routers_stay(tmp_path):
    moe_checkpoints.write_moe(tmp_path, "qwen3_moe", vocab_size=4096)
    finish(tmp_path)
    result = run(tmp_path, 5.0, tmp_path / "journal.jsonl", curve=False)
    experts = [weight for weight in result.chosen if any(".experts." in name for name in weight.names)]
    assert len(experts) == 1 and all(len(weight.names) > 3 for weight in experts)
    assert any("routers stay" in note for note in result.notes) and result.bits <= 5.0
    assert all(weight.harm < 1 for weight in experts)


def test_bits_are_those_of_codes_scales_and_zero_points():
    """By hand for a row of 128: codes, float16 scales, zero points of the codes' bits, e4m3 scales and one float32."""
    weight = torch.randn(8, 128)
    shape = LinearShape(Span.full(128), (Span.full(8),), ("x",), torch.float32)
    for text, expected in (
        ("int3:group_size=64", 128 * 3 + 2 * (16 + 3)),
        ("int4:group_size=32,symmetric=true", 128 * 4 + 4 * 16),
        ("int4:group_size=64,scale=hqq", 128 * 4 + 2 * (16 + 32)),
        ("nvfp4", 128 * 4 + 8 * 8 + 4),
        ("fp8", 128 * 8 + 32),
        ("none", 128 * 16),
    ):
        (method,) = read_methods([text], torch.bfloat16)
        assert stored_bits(method.target.quantize(weight, shape)) == 8 * expected, text
