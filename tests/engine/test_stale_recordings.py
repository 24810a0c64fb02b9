"""Weights and attributes that are edited while requests decode: a replayed step gives what an eager one gives."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn

import pymllm.engine.watch as watch_module
from pymllm import LLM
from pymllm.engine.tape import record
from pymllm.engine.watch import Watch
from pymllm.layers.rotary_embedding import _get_rope
from pymllm.swapping.swap import swap

from ..kernels.integer_cases import needs_native
from .answers import greedy

pytestmark = needs_native
EDITED_AT, STEPS = 7, 14  # the step before which the model is edited: a recorded one, the fifth at least


def other(tensor: torch.Tensor) -> torch.Tensor:
    """Return another tensor of the same shape."""
    drawn = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1))
    return (drawn * 3).to(tensor.dtype)


def norm(model: nn.Module) -> nn.Module:
    return model.model.layers[1].input_layernorm


def packed(model: nn.Module) -> dict[str, torch.Tensor]:
    return model.model.layers[1].mlp.down_proj.bound.packed


def negated(result):
    return (-result[0], *result[1:]) if isinstance(result, tuple) else -result


def new_data(model):
    norm(model).weight.data = other(norm(model).weight)


def another_class(model):
    module = norm(model)
    kind = type(module)
    module.__class__ = type(
        "Other", (kind,), {"forward": lambda self, *given: negated(kind.forward(self, *given))}
    )


def new_data_everywhere_in_memory_that_is_freed(model):
    for param in model.parameters():
        param.data = other(param)
    gc.collect()
    model.junk = [torch.full((256,), 1e4) for _ in range(300)]


def new_parameter(model):
    norm(model).weight = nn.Parameter(other(norm(model).weight))


def new_parameter_behind_the_modules_back(model):
    norm(model)._parameters["weight"] = nn.Parameter(other(norm(model).weight))


def same_memory_other_strides(model):
    weight = norm(model).weight
    weight.data = weight.data[:1].expand(weight.shape)


def other_memory_by_set(model):
    with torch.no_grad():
        norm(model).weight.set_(other(norm(model).weight))


def in_place(model):
    with torch.no_grad():
        norm(model).weight.mul_(-2)


def packed_in_place(model):
    packed(model)["blocks"].view(torch.uint8).bitwise_xor_(7)


def packed_data(model):
    tensor = packed(model)["blocks"]
    tensor.data = (
        tensor ^ 7 if tensor.dtype is torch.uint8 else (tensor.view(torch.uint8) ^ 7).view(tensor.dtype)
    )


def packed_item(model):
    packed(model)["blocks"] = (packed(model)["blocks"].view(torch.uint8) ^ 7).view(
        packed(model)["blocks"].dtype
    )


def packed_weight_behind_a_frozen_value(model):
    bound = model.model.layers[1].mlp.down_proj.bound
    blocks = (bound.packed["blocks"].view(torch.uint8) ^ 7).view(bound.packed["blocks"].dtype)
    object.__setattr__(bound, "packed", {**bound.packed, "blocks": blocks})


def assigned_state(model):
    weights = {
        name: other(value) for name, value in model.state_dict().items() if name.endswith("norm.weight")
    }
    assert weights
    model.load_state_dict(weights, strict=False, assign=True)


def copied_state(model):
    weights = {
        name: other(value) for name, value in model.state_dict().items() if name.endswith("norm.weight")
    }
    model.load_state_dict(weights, strict=False)


def other_layers(model):
    model.model.layers[1], model.model.layers[3] = model.model.layers[3], model.model.layers[1]


def layer_behind_the_lists_back(model):
    model.model.layers._modules["1"] = model.model.layers[4]


def epsilon(model):
    norm(model).eps = 3.0


def attention_scale(model):
    attention = model.model.layers[1].self_attn.attn
    attention.problem = dataclasses.replace(attention.problem, scale=attention.problem.scale * 5)


def forward_of_one_module(model):
    module = norm(model)
    run = module.forward
    module.forward = lambda *given: negated(run(*given))


def class_of_one_module(model):
    run = type(norm(model)).forward
    kind = type("Negated", (type(norm(model)),), {"forward": lambda *given: negated(run(*given))})
    norm(model).__class__ = kind


def hook(model):
    norm(model).register_forward_hook(lambda module, given, result: negated(result))


def rotary_table(model):
    rotary = model.model.layers[0].self_attn.rotary
    rotary.inverse_frequencies = rotary.inverse_frequencies * 0.3
    rotary._tables.clear()


def adapter(model):
    layer = model.model.layers[1].mlp.down_proj
    layer.init_lora(4, 8.0)
    layer.lora_B.data = other(layer.lora_B)


def swapped(model):
    swap(model, "**.layers.1.**", "int8")


@pytest.fixture(autouse=True, scope="module")
def rotary_tables_of_this_module():
    """Models share these, so that an edit of one would reach the next."""
    yield
    _get_rope.cache_clear()


EDITS = [
    *(
        new_data,
        another_class,
        new_data_everywhere_in_memory_that_is_freed,
        new_parameter,
        new_parameter_behind_the_modules_back,
    ),
    *(same_memory_other_strides, other_memory_by_set, in_place, packed_in_place, packed_data, packed_item),
    *(packed_weight_behind_a_frozen_value, assigned_state, copied_state, other_layers),
    *(layer_behind_the_lists_back, epsilon, attention_scale, forward_of_one_module, class_of_one_module),
    *(hook, rotary_table, adapter, swapped),
]


class Edited:
    """A model that is edited in the middle of an answer; every step's logits stand beside an eager step's.

    replayed: whether each step was.  differences: the numbers of steps whose logits are not the eager ones.
    changes: whether the edit changes the logits of the step after it.
    """

    def __init__(self, llm: LLM, edit, prompt: list[int]) -> None:
        self.replayed: list[bool] = []
        self.differences: list[int] = []
        self.changes = False
        runner = llm.engine.runner

        def step(requests, cache):
            number, before = len(self.replayed), None
            if number == EDITED_AT:
                assert any(batch.trusted for batch in runner._decoding.values())
                before = runner._read(requests, cache).clone()
                edit(llm.model)
            trusted = [batch for batch in runner._decoding.values() if batch.trusted]
            logits = type(runner).step(runner, requests, cache).clone()
            self.replayed.append(any(batch in trusted for batch in runner._decoding.values()))
            eager = runner._read(requests, cache)
            if not torch.equal(logits, eager):
                self.differences.append(number)
            self.changes |= before is not None and not torch.equal(before, eager)
            return logits

        runner.step = step
        llm.generate([prompt], greedy(STEPS))
        del runner.step


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_the_step_after_an_edit_is_an_eager_one_and_later_ones_are_recorded_anew(edit):
    found = Edited(LLM(dtype="float32"), edit, [5, 6, 7])
    assert found.changes and found.replayed[EDITED_AT - 1] and not found.differences
    # An edit in place is read from the same memory; a hook is called in every step.
    assert found.replayed[EDITED_AT] == (edit in (in_place, packed_in_place, copied_state))
    assert found.replayed[-1] == (edit is not hook)


@pytest.mark.parametrize("edit", [new_data, packed_item, other_layers])
def test_a_captured_step_is_not_replayed_after_an_edit(edit):
    """A tape stands for a CUDA graph: it has the addresses of what the captured step read."""
    llm = LLM(dtype="float32")
    llm.engine.runner.capture = lambda run: record(run, run()).play
    found = Edited(llm, edit, [5, 6, 7])
    assert found.changes and found.replayed[EDITED_AT - 1] and not found.replayed[EDITED_AT]
    assert found.replayed[-1] and not found.differences


def test_a_watch_without_the_extension_finds_the_same(monkeypatch):
    model = LLM(dtype="float32").model
    functions = watch_module._functions()
    for edit in (
        new_data,
        another_class,
        new_parameter,
        packed_item,
        other_layers,
        layer_behind_the_lists_back,
        attention_scale,
    ):
        watches = [Watch(model=model)]
        with monkeypatch.context() as patch:
            patch.setattr(watch_module, "_functions", lambda: None)
            watches.append(Watch(model=model))
        assert functions is not None and [watch._native is None for watch in watches] == [False, True]
        assert not any(watch.changed() for watch in watches)
        edit(model)
        assert all(watch.changed() for watch in watches)


def test_pages_of_the_cache_that_were_filled_before_an_edit_are_not_reused():
    llm, prompt = LLM(dtype="float32"), [9] * 40
    before = llm.generate([prompt], greedy(12))[0].token_ids
    new_data_everywhere_in_memory_that_is_freed(llm.model)
    fresh = LLM(dtype="float32")
    new_data_everywhere_in_memory_that_is_freed(fresh.model)
    assert (
        llm.generate([prompt], greedy(12))[0].token_ids == fresh.generate([prompt], greedy(12))[0].token_ids
    )
    assert llm.generate([prompt], greedy(12))[0].token_ids != before


def test_a_step_that_changes_its_model_is_never_replayed():
    llm = LLM(dtype="float32")
    module, calls = norm(llm.model), []
    run = module.forward

    def forward(*given):
        calls.append(len(calls))
        return run(*given)

    module.forward = forward
    llm.generate([[5, 6, 7]], greedy(12))
    assert len(calls) >= 12 and not any(batch.trusted for batch in llm.engine.runner._decoding.values())


def test_what_is_set_in_a_layer_frees_the_weights_that_were_recorded():
    llm = LLM(dtype="float32")
    llm.generate([[5, 6, 7]], greedy(8))
    old = weakref.ref(packed(llm.model)["blocks"])
    change = swap(llm.model, "**.layers.1.**", "int8")
    change.commit()
    gc.collect()
    assert old() is None
