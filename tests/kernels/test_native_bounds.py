"""Native code never touches memory outside of what it is given: every tensor of every call, spoilt in every way.

Each spoilt call is refused by an error of ours, or gives what the whole call gives. A read outside ends the process, or
is told by AddressSanitizer (make sanitize).
"""

import pytest
import torch

import pymllm
from pymllm.attention import Attention
from pymllm.config import Execution
from pymllm.errors import ConfigError, IndicesError, PymllmError
from pymllm.kernels.aten.attention import TorchAttention
from pymllm.kernels.aten.kv_store import TorchKVStore
from pymllm.kernels.attention import KVType
from pymllm.kernels.native.attention import NativeAttention, NativeKVStore
from pymllm.kernels.native.extension import native
from pymllm.kernels.reference.attention import ReferenceAttention

from ..attention.steps import make_case, make_problem
from .integer_cases import needs_native
from .native_calls import CALLS, NativeInt4Embedding, attention, embedding, integers, store

pytestmark = needs_native


def with_storage(tensor, share):
    """A copy whose storage has been resized to a share of what it needs."""
    copy = tensor.clone()
    copy.untyped_storage().resize_(int(copy.nbytes * share))
    return copy


def view_of_nothing(tensor):
    """A view at an offset into a storage that is gone: torch gives its address as the offset alone."""
    whole = torch.zeros(tensor.numel() + 8, dtype=tensor.dtype)
    view = whole[8:].view(tensor.shape)
    whole.untyped_storage().resize_(0)
    return view


def shifted(tensor):
    """The same numbers at the end of a storage that has then been cut: as many bytes as needed, from its beginning."""
    whole = torch.zeros(tensor.numel() + 8, dtype=tensor.dtype)
    view = whole[8:].view(tensor.shape)
    whole.untyped_storage().resize_(tensor.nbytes)
    return view


def apart(tensor):
    """The same numbers, two elements apart."""
    wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


def cut_apart(tensor):
    """Numbers apart, whose storage has been cut where they would be if they were not."""
    spread = apart(tensor)
    spread.untyped_storage().resize_(tensor.nbytes)
    return spread


OTHER = {True: torch.float64, False: torch.float32}
# Each makes a tensor that must be refused where the call reads it.
SPOILT = {
    "shorter": lambda t: t[..., :-1].contiguous(),
    "fewer": lambda t: t[:-1],
    "empty": lambda t: t[:0],
    "another side": lambda t: t.unsqueeze(0).repeat(2, *[1] * t.ndim),
    "meta": lambda t: t.to("meta"),
    "another dtype": lambda t: t.to(OTHER[t.is_floating_point()]),
    "complex": lambda t: t.to(torch.complex64),
    "nothing left": lambda t: with_storage(t, 0),
    "half left": lambda t: with_storage(t, 0.5),
    "a view of nothing": view_of_nothing,
    "cut in front": shifted,
    "apart and cut": cut_apart,
    "repeated": lambda t: t[:1].expand(t.shape),
    "sparse": lambda t: t.to_sparse(),
    "negated": lambda t: torch._neg_view(-t),
    "apart": apart,
}


def outcome(call, tensors):
    """What a call gives, or the error of ours that refuses it; a foreign error fails the test."""
    try:
        found = call.run(tensors)
    except PymllmError as error:
        return error
    return found if isinstance(found, list) else [found]


def same(found, expected):
    return all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(found, expected, strict=True)
    )


# Other tokens, ids or heads make another call, and weights on meta a plan.
ANOTHER_CALL = {"fewer", "empty", "another side", "repeated"}


def is_another(name, which, way):
    ids = which == "ids" or (name == "rotary" and which == "x")
    return (
        way in ANOTHER_CALL
        or (ids and way == "shorter")
        or (way == "meta" and name in ("packing", "unpacking"))
        or (name == "norm" and which == "x" and way == "another dtype")
        # Nobody makes these negated, and to ask costs every call.
        or (way == "negated" and which in OUR_OWN)
    )


OUR_OWN = {
    "settings",
    "bias_values",
    "seen_counts",
    "blocks",
    "codes",
    "table",
    "scales",
    "row_nan",
    "row_factors",
    "weight",
} | {f"{product}.{name}" for product in ("gate_up", "down") for name in ("blocks", "row_factors")}


@pytest.mark.parametrize("name", CALLS)
def test_a_spoilt_tensor_is_refused_or_makes_no_difference(name):
    torch.manual_seed(0)
    call = CALLS[name]()
    expected = outcome(call, dict(call.tensors))
    assert isinstance(expected, list), expected
    for which, tensor in call.tensors.items():
        for way, spoil in SPOILT.items():
            try:
                spoilt = spoil(tensor.clone())
            except (RuntimeError, NotImplementedError):
                continue  # torch cannot make it of this dtype
            found = outcome(call, {**call.tensors, which: spoilt})
            if isinstance(found, PymllmError):
                assert str(found) and isinstance(found, ConfigError), (which, way, found)
            elif not is_another(name, which, way):
                assert same(found, expected), (which, way)
        assert same(outcome(call, dict(call.tensors)), expected), which


def beyond(least, end, dtype):
    """Numbers that name nothing: next to the range, and those that look like inside it when they are cut to 32 bits."""
    wrong = [end, end + 1, 2**31 - 1, least - 1, -(2**31)]
    if dtype is torch.int64:
        wrong += [2**31, 2**32, 2**32 + max(least, 0), 2**40, 2**62, -(2**63), 2**63 - 1]
    limits = torch.iinfo(dtype)
    return [n for n in wrong if limits.min <= n <= limits.max and not least <= n < end]


@pytest.mark.parametrize("name", [name for name in CALLS if CALLS[name]().ids])
def test_a_number_that_names_nothing_is_refused_at_every_call(name):
    """In a tensor of its own, and written into the one of the call before, as an engine writes its steps."""
    torch.manual_seed(0)
    call = CALLS[name]()
    for which, (least, end) in call.ids.items():
        tensor = call.tensors[which]
        for dtype in {tensor.dtype, torch.int64}:
            for number in beyond(least, end, dtype):
                for place in {0, tensor.numel() - 1}:
                    given = tensor.to(dtype).clone()
                    assert isinstance(outcome(call, {**call.tensors, which: given}), list)
                    given.view(-1)[place] = number
                    found = outcome(call, {**call.tensors, which: given})
                    if place and (
                        which == "page_tables" or (which == "context_lens" and "state" in call.tensors)
                    ):
                        continue  # a column that no token is in; lengths of states have no limit
                    assert isinstance(found, IndicesError), (which, dtype, number, place, found)


def test_a_step_is_looked_at_again_when_its_tensors_are_others_or_lie_elsewhere():
    call = attention()
    whole = outcome(call, dict(call.tensors))
    for which in ("page_tables", "cu_seqlens_q", "context_lens", "cache k", "cache v"):
        tensor = call.tensors[which]
        kept = tensor.clone()
        assert same(outcome(call, {**call.tensors, which: kept}), whole)
        kept.untyped_storage().resize_(0)
        assert isinstance(outcome(call, {**call.tensors, which: kept}), ConfigError), which
        kept.untyped_storage().resize_(tensor.nbytes)
        kept.copy_(tensor)
        assert same(outcome(call, {**call.tensors, which: kept}), whole)
        kept.data = tensor.clone()
        assert same(outcome(call, {**call.tensors, which: kept}), whole)
    # In the same memory, but in another form.
    for which in ("cache k", "cache v", "page_tables"):
        kept = call.tensors[which].clone()
        assert same(outcome(call, {**call.tensors, which: kept}), whole)
        kept.as_strided_(kept.shape, [0] * kept.ndim)
        found = outcome(call, {**call.tensors, which: kept})
        whole_copy = {**call.tensors, which: kept.contiguous()}
        assert isinstance(found, ConfigError) if "cache" in which else same(found, outcome(call, whole_copy))
        assert "cache" in which or not same(found, whole)
    for tokens in (call.tensors["q"][:4], call.tensors["q"].repeat(2, 1, 1)):
        assert isinstance(outcome(call, {**call.tensors, "q": tokens}), IndicesError)


def test_a_tape_refuses_what_its_tensors_hold_and_goes_on_with_the_next_step():
    """A refusal while a tape is played is an error of ours, on as many threads as there are."""
    call = attention(KVType(torch.float32))
    q, table = call.tensors["q"], call.tensors["page_tables"]
    tape = native().Tape()
    tape.record()
    expected = call.run(call.tensors)
    tape.stop()
    assert len(tape) == 1
    right = int(table[0, 0])
    for wrong in (-1, 10**8, call.ids["page_tables"][1]):
        table[0, 0] = wrong
        with pytest.raises(IndicesError, match="page_tables"):
            tape.play(0, 1)
    table[0, 0] = right
    before = expected.clone()
    expected.zero_()
    tape.play(0, 1)
    assert torch.equal(expected, before) and q.shape[0] == before.shape[0]


def test_a_tape_that_is_forgotten_while_it_records_stays_until_another_is_recorded():
    native().Tape().record()
    call = attention()
    assert isinstance(outcome(call, call.tensors), list)
    other = native().Tape()
    other.record()
    call.run(call.tensors)
    other.stop()
    assert len(other) == 1


@pytest.mark.parametrize(
    "kernel", [NativeAttention(), TorchAttention(), ReferenceAttention()], ids=lambda k: k.name
)
def test_every_kernel_refuses_a_step_whose_tensors_were_written_to(kernel):
    problem = make_problem(page_size=4)
    case = make_case(problem, [(9, 3), (0, 6)])
    step, case.step.page_size = case.step, 4

    def run(tokens=9):
        return kernel.run(problem, case.q[:tokens], case.k, case.v, step, case.cache)

    expected = run()
    for tensor, number in ((step.page_tables, 10**6), (step.page_tables, -1), (step.context_lens, 100)):
        before = tensor.clone()
        tensor.view(-1)[0] = number
        with pytest.raises(IndicesError, match="page_tables"):
            run()
        tensor.copy_(before)
        assert torch.equal(run(), expected)
    with pytest.raises(ConfigError, match="cu_seqlens_q must go from 0 to 4"):
        run(4)
    step.page_tables = torch.full_like(step.page_tables, case.cache.k.shape[0])
    with pytest.raises(IndicesError, match="page_tables"):
        run()


@pytest.mark.parametrize("kernel", [NativeKVStore(), TorchKVStore()], ids=lambda k: k.name)
def test_every_store_refuses_slots_that_were_written_to(kernel):
    problem = make_problem(page_size=4)
    case = make_case(problem, [(9, 3), (0, 6)])
    case.step.slot_mapping = torch.arange(9)

    def run():
        kernel.run(problem, case.k, case.v, case.cache, case.step)

    run()
    case.step.slot_mapping[3] = case.cache.k.shape[0] * 4
    with pytest.raises(IndicesError, match="slot_mapping names"):
        run()
    case.step.slot_mapping = torch.arange(4)
    with pytest.raises(IndicesError, match="slot_mapping must"):
        run()


def test_new_keys_may_come_out_of_the_pages_that_they_go_to():
    call = store(KVType(torch.float32))
    pages = call.tensors["cache k"]
    tokens = call.tensors["new k"].shape[0]
    flat = pages.flatten(0, 1)
    expected = flat.clone()
    expected[1 : tokens + 1] = flat[1 : tokens + 1]
    slots = torch.arange(tokens) + 1
    call.run({**call.tensors, "new k": flat[1 : tokens + 1], "slot_mapping": slots})
    assert torch.equal(flat, expected)


def test_errors_say_what_was_expected_what_was_found_and_what_to_do():
    call = embedding(NativeInt4Embedding(), integers(4, (20, 64, 32), zeros="each"))
    with pytest.raises(IndicesError, match=r"an id is outside the table; expected 0 to 19, found 20 at 1\."):
        call.run({**call.tensors, "ids": torch.tensor([0, 20])})
    with pytest.raises(
        ConfigError, match=r"ids must be \[\*\] integers on the CPU, not \[1\] torch.float32 on cpu"
    ):
        call.run({**call.tensors, "ids": torch.tensor([1.5])})
    blocks = with_storage(call.tensors["blocks"], 0)
    with pytest.raises(ConfigError, match=r"with 0 of its \d+ bytes of memory\. Give a whole tensor"):
        call.run({**call.tensors, "blocks": blocks})


@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_layers_refuse_inputs_that_torch_would_read_without_a_look(method):
    layers = torch.nn.Sequential(torch.nn.Embedding(64, 64), torch.nn.Linear(64, 64))
    pymllm.quantize_model(layers, {"**": method})
    ids = torch.ones(2, dtype=torch.int64)
    for wrong in (with_storage(ids, 0), ids - 3, ids + 2**40, ids.float(), ids.expand(1 << 40, 2), [1], None):
        with pytest.raises(PymllmError):
            layers[0](wrong)
    for wrong in ([[0.0] * 64], None, torch.ones(1).expand(1 << 40, 64), torch.tensor(1.0)):
        with pytest.raises(PymllmError):
            layers[1](wrong)


def test_an_attention_layer_refuses_what_has_no_heads():
    with Execution(dtype=torch.float32):
        layer = Attention(4, 8, 1.0, 2)
    q, k = torch.zeros(2, 32), torch.zeros(2, 16)
    for wrong in (torch.tensor(1.0), torch.zeros(32), q.to_sparse(), torch.zeros(1, 64), [1], None):
        for given in ((wrong, k, k), (q, wrong, k), (q, k, wrong)):
            with pytest.raises(ConfigError, match="must be"):
                layer(*given)
