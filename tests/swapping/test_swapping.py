"""`swap` on a running model: the same as loading with the rule, all of it or nothing, and back again bit for bit."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pymllm
import pymllm.layers.swapped
import pymllm.swapping.swap
from pymllm import LLM, SamplingParams
from pymllm.api import load_model
from pymllm.checking.verify import verify
from pymllm.errors import ConfigError, PymllmError, RuleError
from pymllm.layers.weighted import weighted_layers
from pymllm.parallel import simulate
from pymllm.quantization.formats.fp8 import Fp8LinearMethod

from ..checkpoints import TinyCheckpoint, write_checkpoint
from ..forward import logits_of
from ..moe_checkpoints import write_moe

IDS = list(range(5, 29))
PAGE = Path(__file__).parents[2] / "docs" / "swapping.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> TinyCheckpoint:
    return write_checkpoint(tmp_path_factory.mktemp("awq"), "llama", "awq-g64")


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> TinyCheckpoint:
    folder = tmp_path_factory.mktemp("tied")
    return write_checkpoint(folder, "qwen2", "none", tie_word_embeddings=True, vocab_size=104)


@pytest.fixture
def llm(checkpoint) -> LLM:
    return LLM(checkpoint.folder, device="cpu", dtype="float32")


def tensors_of(model) -> dict[str, Tensor]:
    """Every packed tensor and parameter that runs, by name."""
    found = dict(model.named_parameters())
    for name, module in model.named_modules():
        bound = getattr(module, "bound", None)
        found |= {f"{name}:{key}": tensor for key, tensor in (bound.packed if bound else {}).items()}
    return found


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name] is other[name] for name in one)


def weights_are_as_planned(llm: LLM) -> bool:
    """Whether every packed weight is what its method makes of the checkpoint's tensors, which are read again."""
    return all(layer.packed_exact for layer in verify(llm).layers)


RULES = {
    "all": ("**", "fp8"),
    "down": ("**.down_proj", "int8"),
    "whole-fused": ("model.layers.0.self_attn.*", "fp8:granularity=tensor"),
    "part-of-fused": ("**.v_proj", "fp8:granularity=block"),
    "two-of-three": ("re:.*\\.(q|k)_proj", "none"),
    "head": ("lm_head", "fp8"),
}


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        *(("awq-g64", rule) for rule in RULES),
        *(
            ("fp8-tensor", rule) for rule in ("down", "part-of-fused", "two-of-three")
        ),  # a scale for each part
        ("fp8-block-64x32", "two-of-three"),
        ("none-bf16", "all"),
    ],
)
def test_a_swap_runs_what_loading_with_the_rule_runs_and_undo_what_ran_before(tmp_path, source, rule):
    pattern, method = RULES[rule]
    folder = write_checkpoint(tmp_path, "llama", source).folder
    llm = LLM(folder, device="cpu", dtype="float32")
    logits, tensors, plan = llm.logits(IDS), tensors_of(llm.model), llm.plan

    swap = pymllm.swap(llm, pattern, method)
    assert swap.changed
    loaded = LLM(folder, {pattern: method}, device="cpu", dtype="float32")
    assert torch.equal(llm.logits(IDS), loaded.logits(IDS))
    if source == "awq-g64" and method != "none":  # else the same values may come out
        assert not torch.equal(llm.logits(IDS), logits)
    # Both call the decision their own; a load also names the rule where it changes nothing.
    rows = [row.__dict__ | {"source": "", "rule": ""} for row in llm.plan.layers]
    assert rows == [row.__dict__ | {"source": "", "rule": ""} for row in loaded.plan.layers]
    assert llm.plan.totals == loaded.plan.totals
    assert {row.prefix for row in llm.plan.layers if row.source == "swap"} == set(swap.changed)
    assert weights_are_as_planned(llm)

    swap.undo()
    assert same_tensors(tensors_of(llm.model), tensors)
    assert torch.equal(llm.logits(IDS), logits)
    assert llm.plan is plan
    assert weights_are_as_planned(llm)


def test_a_file_of_rules_is_one_swap_in_which_the_first_rule_decides(checkpoint, llm, tmp_path):
    file = tmp_path / "rules.txt"
    file.write_text("# from a search\n**.down_proj=fp8\n**.mlp.**=int8\n")
    tensors = tensors_of(llm.model)
    loaded = LLM(checkpoint.folder, file, device="cpu", dtype="float32")
    with pymllm.swap(llm, f"@{file}") as swap:
        assert torch.equal(llm.logits(IDS), loaded.logits(IDS))
        assert llm.plan.layer("model.layers.0.mlp.down_proj").method == "fp8"
        assert llm.plan.layer("model.layers.0.mlp.up_proj").method == "int8"
        assert "by 2 rules" in str(swap)
        assert weights_are_as_planned(llm)
    assert same_tensors(tensors_of(llm.model), tensors)
    for nothing in ([], {}, None):
        with pytest.raises(RuleError, match="a pattern and a method, or rules"):
            pymllm.swap(llm, nothing)


def test_a_partly_matched_layer_is_split_and_the_other_parts_keep_their_values(llm):
    layer = llm.model.model.layers[0].self_attn.qkv_proj
    before = layer.bound.canonical().dequantize(torch.float64)
    q, k, v = before.split([span.size for span in layer.shape.outputs])
    with pymllm.swap(llm, "model.layers.0.self_attn.k_proj", "fp8") as swap:
        assert swap.changed == ["model.layers.0.self_attn.k_proj"]
        parts = [getattr(layer, f"part_{index}").bound.canonical() for index in range(3)]
        assert torch.equal(parts[0].dequantize(torch.float64), q)
        assert torch.equal(parts[2].dequantize(torch.float64), v)
        assert 0 < float((parts[1].dequantize(torch.float64) - k).norm() / k.norm()) < 0.04
        assert any("separate weights" in note for note in llm.plan.notes)
        # A split layer can be swapped on: the part that changes is the only one that is made anew.
        with pymllm.swap(llm, "model.layers.0.self_attn.q_proj", "int8"):
            assert layer.part_1.bound.canonical().type == parts[1].type
            assert llm.plan.layer("model.layers.0.self_attn.q_proj").method == "int8"
            assert weights_are_as_planned(llm)
    assert not hasattr(layer, "part_0")
    assert torch.equal(layer.bound.canonical().dequantize(torch.float64), before)


@pytest.mark.parametrize("pattern", ["lm_head", "model.embed_tokens", "re:lm_head|model.embed_tokens", "**"])
def test_a_tied_head_follows_as_loading_would_have_it(tied, pattern):
    llm = LLM(tied.folder, device="cpu", dtype="float32")
    logits = llm.logits(IDS)
    swap = pymllm.swap(llm, pattern, "fp8")
    loaded = LLM(tied.folder, {pattern: "fp8"}, device="cpu", dtype="float32")
    assert torch.equal(llm.logits(IDS), loaded.logits(IDS))
    assert llm.model.lm_head.shares_table == loaded.model.lm_head.shares_table
    assert llm.plan.totals == loaded.plan.totals
    assert weights_are_as_planned(llm)
    swap.undo()
    assert llm.model.lm_head.shares_table
    assert torch.equal(llm.logits(IDS), logits)


def test_experts_stored_with_inputs_before_outputs_stay_where_the_swap_does_not_name_them(tmp_path):
    """gpt_oss in floats: how its experts are stored is nothing that a swap could ask a layer again."""
    there = write_moe(tmp_path / "in", "gpt_oss", stacked=True)
    model = load_model(there.folder, dtype="float32")
    ids = torch.tensor(IDS)
    before = logits_of(model, ids)
    done = pymllm.swap(model, "**.q_proj", "int8")
    assert done.changed == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    assert torch.equal(
        logits_of(model, ids),
        logits_of(load_model(there.folder, {"**.q_proj": "int8"}, dtype="float32"), ids),
    )
    done.undo()
    assert torch.equal(logits_of(model, ids), before)


def test_a_head_swapped_after_its_embedding_shares_the_table_again(tied):
    llm = LLM(tied.folder, device="cpu", dtype="float32")
    first = pymllm.swap(llm, "model.embed_tokens", "fp8")
    assert not llm.model.lm_head.shares_table
    second = pymllm.swap(llm, "lm_head", "fp8")
    assert llm.model.lm_head.shares_table
    loaded = LLM(tied.folder, {"re:lm_head|model.embed_tokens": "fp8"}, device="cpu", dtype="float32")
    assert torch.equal(llm.logits(IDS), loaded.logits(IDS))
    second.undo()
    first.undo()
    assert llm.model.lm_head.shares_table


def failing(call, when: int, error: BaseException):
    """`call`, which raises instead the `when`-th time."""
    count = 0

    def wrapped(*args, **options):
        nonlocal count
        count += 1
        if count == when:
            raise error
        return call(*args, **options)

    return wrapped


FAULTS = {
    "quantize": (Fp8LinearMethod, "quantize", 6, RuntimeError("injected")),
    "out-of-memory": (Fp8LinearMethod, "quantize", 9, torch.OutOfMemoryError("injected")),
    "pack": (pymllm.layers.swapped, "bind_for", 5, MemoryError("injected")),
    "interrupt": (Fp8LinearMethod, "quantize", 4, KeyboardInterrupt()),
    "install": (pymllm.layers.swapped.LayerState, "install", 3, RuntimeError("injected")),
    "plan": (pymllm.swapping.swap, "make_plan", 1, RuntimeError("injected")),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("pattern", ["**", "re:.*\\.(q|up)_proj"])
def test_a_swap_that_fails_half_way_leaves_the_model_as_it_was(llm, monkeypatch, fault, pattern):
    owner, name, when, error = fault
    logits, tensors, plan, prepared = llm.logits(IDS), tensors_of(llm.model), llm.plan, llm.model.prepared
    modules = dict(llm.model.named_modules())
    with monkeypatch.context() as patch:
        if pattern != "**":
            when = min(when, 3)  # fewer layers
        patch.setattr(owner, name, failing(getattr(owner, name), when, error))
        with pytest.raises(type(error)):
            pymllm.swap(llm, pattern, "fp8")
    assert same_tensors(tensors_of(llm.model), tensors)
    assert dict(llm.model.named_modules()) == modules
    assert torch.equal(llm.logits(IDS), logits)
    assert llm.plan is plan and llm.model.prepared is prepared
    pymllm.swap(llm, pattern, "fp8").undo()  # and it works when nothing fails
    assert torch.equal(llm.logits(IDS), logits)


@pytest.mark.parametrize(
    ("pattern", "method", "code"),
    [
        ("**", "awq:group_size=48", "group-size"),  # 128 inputs
        ("**", "awq:group_size=64", "packing"),  # lm_head: 97 outputs
        ("**", "fp9", "unknown-method"),
        ("**", "fp8:granularity=row", "bad-option"),
        ("**", "compressed-tensors", "not-a-target"),
        ("re:(", "fp8", "rule-syntax"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(llm, pattern, method, code):
    tensors = tensors_of(llm.model)
    with pytest.raises(PymllmError) as caught:
        pymllm.swap(llm, pattern, method)
    assert caught.value.code == code
    assert same_tensors(tensors_of(llm.model), tensors)


def test_an_unmatched_pattern_is_an_error_with_the_nearest_names(llm):
    with pytest.raises(RuleError, match=r"model\.layers\.0\.mlp\.down_proj"):
        pymllm.swap(llm, "model.layers.0.mlp.down_prj", "fp8")
    with pytest.raises(RuleError, match=r"model\.layers\.0\.mlp\.\*\*"):
        pymllm.swap(llm, "model.layers.0.mlp", "fp8")


@pytest.mark.parametrize("method", ["awq", "awq:group_size=64"])
def test_a_swap_to_the_method_that_runs_already_changes_nothing_and_says_so(llm, method):
    tensors, plan = tensors_of(llm.model), llm.plan
    swap = pymllm.swap(llm, "**.mlp.*", method)
    assert swap.nothing_to_do and not swap.changed
    assert len(swap.unchanged) == 6
    assert "nothing to do" in str(swap)
    assert same_tensors(tensors_of(llm.model), tensors) and llm.plan is plan
    swap.undo()
    assert same_tensors(tensors_of(llm.model), tensors)


def test_swaps_are_undone_latest_first(llm):
    logits = llm.logits(IDS)
    first = pymllm.swap(llm, "**.mlp.*", "fp8")
    middle = llm.logits(IDS)
    second = pymllm.swap(llm, "**", "int8")
    assert weights_are_as_planned(llm)  # against the chain awq -> fp8 -> int8
    assert llm.plan.layer("model.layers.0.mlp.down_proj").source_method == "awq"
    with pytest.raises(ConfigError, match="later one first"):
        first.undo()
    second.undo()
    assert torch.equal(llm.logits(IDS), middle)
    first.undo()
    first.undo()  # a second time: nothing
    assert torch.equal(llm.logits(IDS), logits)


def test_a_committed_swap_keeps_no_old_weights_and_cannot_be_undone(llm):
    with pymllm.swap(llm, "**.mlp.*", "fp8") as swap:
        changed = llm.logits(IDS)
        swap.commit()
    assert torch.equal(llm.logits(IDS), changed)
    assert swap._old == []
    with pytest.raises(ConfigError, match="committed"):
        swap.undo()
    assert 0 < swap.bytes_before < swap.bytes_after  # int4 to fp8


def test_a_generation_under_way_goes_on_with_its_cache(llm):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    expected = llm.generate([IDS], params)[0].token_ids
    stream = llm.stream(IDS, params)
    tokens = [next(stream).token_id for _ in range(5)]
    caches = [layer.self_attn.attn.cache.k for layer in llm.model.model.layers]
    copies = [cache.clone() for cache in caches]
    swap = pymllm.swap(llm, "**.mlp.*", "int8")
    running = [layer.self_attn.attn.cache.k for layer in llm.model.model.layers]
    assert all(a is b for a, b in zip(running, caches, strict=True))
    assert all(torch.equal(cache, copy) for cache, copy in zip(caches, copies, strict=True))
    tokens += [next(stream).token_id for _ in range(3)]
    swap.undo()
    tokens += [piece.token_id for piece in stream]
    assert len(tokens) == 12
    assert tokens[:5] == list(expected[:5])
    assert llm.generate([IDS], params)[0].token_ids == expected


def test_a_swap_from_another_thread_waits_for_its_turn(llm):
    stream = llm.stream(IDS, SamplingParams(max_tokens=4, ignore_eos=True))
    next(stream)
    done = threading.Event()
    thread = threading.Thread(target=lambda: (pymllm.swap(llm, "**.mlp.*", "fp8"), done.set()))
    thread.start()
    assert not done.wait(0.2)
    assert llm.plan.layer("model.layers.0.mlp.down_proj").method == "awq"
    stream.close()
    thread.join(30)
    assert done.is_set()
    assert llm.plan.layer("model.layers.0.mlp.down_proj").method == "fp8"


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_examples_of_the_page_run(example):
    exec(compile(example, "docs/swapping.md", "exec"), {})


def test_a_loaded_model_swaps_without_an_llm_and_other_things_do_not(checkpoint):
    model = load_model(checkpoint.folder, device="cpu", dtype="float32")
    ids = torch.tensor(IDS)
    logits = logits_of(model, ids)
    with pymllm.swap(model, "**.mlp.*", "fp8"):
        assert not torch.equal(logits_of(model, ids), logits)
    assert torch.equal(logits_of(model, ids), logits)
    with pytest.raises(ConfigError, match="load_model"):
        pymllm.swap(torch.nn.Linear(2, 2), "**", "fp8")


def test_ranks_swap_their_shares_and_all_fail_if_one_does(checkpoint):
    ids = torch.tensor(IDS)

    def run(parallel):
        model = load_model(checkpoint.folder, device="cpu", dtype="float32")
        before = logits_of(model, ids)
        swap = pymllm.swap(model, "**.mlp.*", "fp8")
        after = logits_of(model, ids)
        swap.undo()
        if parallel.rank == 1:  # this rank has no kernel for one of the layers
            layer = next(
                layer for layer in weighted_layers(model) if layer.prefix.endswith("1.mlp.down_proj")
            )
            layer.execution = replace(layer.execution, kernels=(("linear", "torch"),))
        with pytest.raises(PymllmError) as caught:
            pymllm.swap(model, "**.mlp.*", "fp8")
        assert caught.value.code == ("swap-rank", "kernel-refused")[parallel.rank]
        assert torch.equal(logits_of(model, ids), before)
        loaded = load_model(checkpoint.folder, {"**.mlp.*": "fp8"}, device="cpu", dtype="float32")
        assert torch.equal(after, logits_of(loaded, ids))

    simulate(2, run)
