"""Native attention and KV store on every instruction set path: float64, threads, what is refused."""

import random
import threading

import pytest
import torch

from pymllm.attention import AttnMetaDataBase
from pymllm.engine.tape import record, repeated
from pymllm.kernels.attention import KVType
from pymllm.kernels.native.attention import NativeAttention, NativeKVStore

from ..attention.steps import KV_TYPES, blocks_of_four, empty_pages, make_case, make_problem
from ..operators import work_of
from .integer_cases import PATHS, needs_native

pytestmark = needs_native

# Sums of float32; rounding of the result to its dtype.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}
MIXED = [(0, 1), (0, 5), (33, 1), (7, 12), (16, 16), (31, 20), (15, 2), (70, 1)]


def run(case, isa=None):
    return NativeAttention(isa).run(case.problem, case.q, case.k, case.v, case.step, case.cache, case.sinks)


def assert_right(case, *paths):
    expected = case.expected()
    for isa in paths or (None,):
        error = float((run(case, isa).double() - expected).abs().max() / expected.abs().max())
        assert error <= TOLERANCES[case.problem.dtype], (isa, error)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(4, 4, 64), (8, 1, 64), (6, 2, 80), (4, 1, 96), (3, 3, 128), (2, 1, 256), (20, 1, 24), (7, 7, 1)],
)
def test_every_path_equals_float64(path, dtype, heads, kv_heads, head_dim):
    problem = make_problem(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    assert_right(make_case(problem, MIXED), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kv", KV_TYPES)
def test_every_path_reads_every_cache_type_under_every_option(path, kv):
    for changes in (
        {"sliding_window": 9},
        {"sliding_window": 1, "sinks": True},
        {"soft_cap": 0.7, "value_head_dim": 48},
        {"soft_cap": 30.0, "sinks": True, "sliding_window": 33, "value_head_dim": 7, "page_size": 5},
    ):
        problem = make_problem(kv=KV_TYPES[kv], num_heads=6, num_kv_heads=2, head_dim=40, **changes)
        assert_right(make_case(problem, MIXED), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [None, 1, 9, 40])
def test_every_path_sees_both_ways(path, window):
    for kv in ("float32", "int8"):
        problem = make_problem(bidirectional=True, sliding_window=window, head_dim=40, kv=KV_TYPES[kv])
        assert_right(make_case(problem, [*MIXED, (0, 90), (700, 3)]), path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [None, 900])
def test_long_contexts_are_taken_in_pieces_and_long_prompts_in_tiles(path, window):
    problem = make_problem(num_heads=4, num_kv_heads=2, head_dim=8, sliding_window=window, sinks=True)
    assert_right(make_case(problem, [(1300, 1), (511, 1), (512, 1), (0, 70)]), path)


IN_BLOCKS = {"prefix_causal": False}


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("block_size", [2, 3, 16, 23, 40])
def test_every_path_sees_whole_blocks_under_every_option(kv, block_size):
    """Few rows and many, at the start of a block and inside it; blocks may be larger than a page, or than a request."""
    requests = [(0, block_size), (3 * block_size, block_size), (33, 1), (7, 2), (5, 47), (block_size - 1, 3)]
    for changes in (
        {},
        {"sliding_window": 9},
        {"sliding_window": 1, "sinks": True, "num_kv_heads": 6},
        {"soft_cap": 0.7, "sinks": True, "value_head_dim": 7, "page_size": 5, "num_kv_heads": 1},
    ):
        settings = {"kv": KV_TYPES[kv], "num_heads": 6, "num_kv_heads": 2, "head_dim": 24} | changes
        problem = make_problem(block_causal=True, **settings)
        assert_right(make_case(problem, requests, block_size=block_size, **IN_BLOCKS), *PATHS)


@pytest.mark.parametrize("seed", range(8))
def test_every_path_sees_blocks_of_random_steps(seed):
    chosen = random.Random(seed)
    heads = chosen.choice([1, 2, 5])
    block_size = chosen.randint(1, 70)
    problem = make_problem(
        block_causal=True,
        num_heads=heads * chosen.randint(1, 9),
        num_kv_heads=heads,
        head_dim=chosen.randint(1, 40),
        page_size=chosen.choice([1, 7, 16]),
        sliding_window=chosen.choice([None, chosen.randint(1, 80)]),
        dtype=chosen.choice([torch.float32, torch.bfloat16]),
        kv=KV_TYPES[chosen.choice([*KV_TYPES])],
    )
    requests = [(chosen.randint(0, 90), chosen.randint(1, 40)) for _ in range(4)]
    states = torch.tensor([chosen.randint(0, 1) for _ in requests], dtype=torch.int32)
    holes = torch.tensor([chosen.randint(0, 60) for _ in requests], dtype=torch.int32)
    case = make_case(
        problem,
        requests,
        seed=seed,
        block_size=block_size,
        status_table=states,
        prefix_causal=chosen.random() < 0.7,
        mask_prefix_hole=chosen.random() < 0.3,
        prefix_lens=holes,
        padded_prefix_lens=holes + 30,
    )
    assert_right(case, *PATHS)


@pytest.mark.parametrize("window", [None, 900])
def test_blocks_over_long_contexts(window):
    """In pieces where rows are few, in tiles where they are many."""
    problem = make_problem(num_heads=2, num_kv_heads=2, head_dim=8, sliding_window=window, block_causal=True)
    assert_right(make_case(problem, [(1300, 4), (510, 4), (640, 2)], block_size=4, **IN_BLOCKS), *PATHS)
    assert_right(make_case(problem, [(1312, 32), (0, 100)], block_size=32, **IN_BLOCKS), *PATHS)
    hole = {"mask_prefix_hole": True, "prefix_lens": torch.tensor([3], dtype=torch.int32)}
    hole["padded_prefix_lens"] = torch.tensor([1250], dtype=torch.int32)
    assert_right(make_case(problem, [(1300, 4)], block_size=4, **IN_BLOCKS, **hole), *PATHS)


@pytest.mark.parametrize("prefix_causal", (False, True))
@pytest.mark.parametrize("hole", (False, True))
def test_states_and_holes_of_a_step_are_obeyed_in_both_regimes(prefix_causal, hole):
    settings = blocks_of_four(prefix_causal=prefix_causal, hole=hole)
    for kv_heads in (4, 1):
        problem = make_problem(block_causal=True, num_heads=4, num_kv_heads=kv_heads)
        assert_right(make_case(problem, [(0, 8), (8, 4), (6, 17), (12, 8)], **settings), *PATHS)


def test_without_a_table_of_states_requests_are_causal_unless_the_step_says_otherwise():
    problem = make_problem(block_causal=True)
    causal = make_case(problem, MIXED)
    assert torch.equal(run(make_case(problem, MIXED, block_size=4)), run(causal))
    assert not torch.equal(run(make_case(problem, MIXED, block_size=4, prefix_causal=False)), run(causal))


def test_a_block_larger_than_any_request_is_all_of_it():
    both_ways = run(make_case(make_problem(bidirectional=True), MIXED))
    for block_size in (71, 2**31, 10**18, 10**30):
        case = make_case(make_problem(block_causal=True), MIXED, block_size=block_size, **IN_BLOCKS)
        assert torch.equal(run(case), both_ways)


@pytest.mark.parametrize("kv", KV_TYPES)
def test_a_recorded_step_of_blocks_reads_the_numbers_of_the_step_that_it_is_played_on(kv):
    """Other lengths, pages, states and queries in the same tensors."""
    problem = make_problem(block_causal=True, kv=KV_TYPES[kv], sinks=True)
    first, second = (
        make_case(
            problem,
            requests,
            seed=seed,
            block_size=4,
            status_table=torch.tensor(states, dtype=torch.int32),
        )
        for seed, requests, states in (
            (0, [(8, 4), (40, 4), (4, 4)], [1, 0, 2]),
            (1, [(44, 4), (12, 4), (0, 4)], [0, 1, 1]),
        )
    )
    fields = {name: value for name, value in vars(first.step).items() if not name.startswith("_")}
    first.step = repeated(AttnMetaDataBase)(**fields)
    tape = record(lambda: run(first), run(first))
    assert len(tape.native) == 1
    for mine, theirs, names in (
        (first, second, ("q", "sinks")),
        (first.step, second.step, ("context_lens", "page_tables", "status_table")),
        (first.cache, second.cache, ("k", "v", "k_scale", "v_scale")),
    ):
        for name in names:
            if getattr(mine, name) is not None:
                getattr(mine, name).copy_(getattr(theirs, name))
    first.step.restart()
    expected = second.expected()
    assert float((tape.play().double() - expected).abs().max() / expected.abs().max()) <= 2e-6


def test_large_logits_neither_overflow_nor_lose_the_others():
    case = make_case(make_problem(scale=8.0), MIXED)  # logits up to about 200; float32's exp ends at 88
    error = float((run(case).double() - case.expected()).abs().max())
    assert error <= 2e-4  # a logit of 200 is rounded to 1.5e-5


def test_requests_without_tokens_are_passed_over():
    case = make_case(make_problem(), [(3, 1), (20, 5)])
    expected = case.expected()
    step = case.step
    step.cu_seqlens_q = torch.tensor([0, 0, 1, 1, 6], dtype=torch.int32)
    step.context_lens = torch.tensor([0, 4, 9, 25], dtype=torch.int32)
    step.page_tables = step.page_tables[[0, 0, 1, 1]]
    assert float((run(case).double() - expected).abs().max()) <= 2e-6


def test_sums_depend_neither_on_threads_nor_on_the_requests_beside():
    problem = make_problem(num_heads=8, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    case = make_case(problem, [(600, 1), (30, 1), (0, 40), (1100, 1)])
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run(case))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    alone = make_case(problem, [(600, 1)])
    alone.q = case.q[:1]
    alone.cache, alone.step.page_tables = case.cache, case.step.page_tables[:1]
    assert torch.equal(run(alone), results[0][:1])
    for step in (case.step, alone.step):
        step.block_size, step.prefix_causal = 32, False
        step._checked.clear()
    assert torch.equal(run(alone), run(case)[:1])


def test_python_threads_at_once_give_what_one_gives():
    problem = make_problem(num_heads=8, num_kv_heads=2, head_dim=64)
    cases = [make_case(problem, [(40 * seed, 1), (0, 50)], seed=seed) for seed in range(4)]
    expected = [run(case) for case in cases]
    wrong = []

    def work(index):
        for _ in range(30):
            if not torch.equal(run(cases[index]), expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_stored_values_equal_torchs_conversion(path, dtype, stored):
    from pymllm.kernels.aten.kv_store import TorchKVStore

    kind = KVType(stored, "token" if stored is torch.int8 else "none")
    problem = make_problem(dtype=dtype, kv=kind, num_kv_heads=3, head_dim=33, value_head_dim=20)
    assert NativeKVStore(path).why_not(problem) is None
    generator = torch.Generator().manual_seed(3)
    k = torch.randn(5, 3, 33, generator=generator).to(dtype)
    v = torch.randn(5, 3 * 20 + 4, generator=generator).to(dtype)[:, :60].view(5, 3, 20)
    k[2] = 0.0
    step = AttnMetaDataBase(slot_mapping=torch.tensor([5, -1, 63, 0, 17]))
    ours, theirs = empty_pages(problem, 4), empty_pages(problem, 4)
    NativeKVStore(path).run(problem, k, v, ours, step)
    TorchKVStore().run(problem, k, v, theirs, step)
    for name in ("k", "v", "k_scale", "v_scale"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert (mine is None) == (other is None)
        assert mine is None or torch.equal(mine, other)


def test_tensors_that_do_not_fit_are_refused_before_any_address_is_read():
    problem = make_problem()
    for change in (
        {"page_tables": torch.full((1, 3), 99, dtype=torch.int32)},
        {"page_tables": torch.tensor([[-1, 0, 0]], dtype=torch.int32)},
        {"page_tables": torch.zeros((0, 3), dtype=torch.int32)},
        {"page_tables": torch.zeros(3, dtype=torch.int32)},
        {"context_lens": torch.tensor([100], dtype=torch.int32)},
        {"context_lens": torch.tensor([1], dtype=torch.int32)},
        {"cu_seqlens_q": torch.tensor([0, 9], dtype=torch.int32)},
        {"block_size": 0},
        {"block_size": 4, "status_table": torch.zeros(2, dtype=torch.int32)},
        {"mask_prefix_hole": True, "prefix_lens": torch.zeros(1, dtype=torch.int32)},
        {"mask_prefix_hole": True, "padded_prefix_lens": torch.zeros(1, dtype=torch.int32)},
    ):
        case = make_case(problem, [(30, 5)])
        for name, value in change.items():
            setattr(case.step, name, value)
        with pytest.raises(ValueError):
            run(case)
    case = make_case(problem, [(30, 5)])
    case.q = case.q.half()
    with pytest.raises(ValueError, match="q must be"):
        run(case)
    for requests, shorter in (([(0, 5)], "k"), ([(0, 5)], "v"), ([(30, 5)], None)):
        case = make_case(problem, requests)
        case.cache = None
        if shorter is not None:
            setattr(case, shorter, getattr(case, shorter)[:4])
        with pytest.raises(ValueError, match="without a cache"):
            run(case)
    case = make_case(problem, [(30, 5)])
    case.step.slot_mapping = torch.tensor([0, 1, 2, 3, 10**6])
    with pytest.raises(ValueError, match="slot_mapping"):
        NativeKVStore().run(problem, case.k, case.v, case.cache, case.step)


def test_what_it_cannot_do_it_refuses():
    assert NativeAttention().why_not(make_problem(block_causal=True)) is None
    assert "float8" in NativeKVStore().why_not(make_problem(kv=KV_TYPES["fp8"]))
    assert NativeAttention().why_not(make_problem(kv=KV_TYPES["fp8"])) is None


def test_a_call_is_native_calls_into_a_new_tensor(monkeypatch):
    """One for attention, one each for keys and values; benchmarks/cpu_dispatch.py times the Python around them."""
    case = make_case(make_problem(num_heads=1, num_kv_heads=1, head_dim=8), [(0, 1)])
    assert work_of(lambda: run(case), monkeypatch) == ["new_empty", "attention"]
    blocks = make_case(
        make_problem(block_causal=True), [(8, 4)] * 2, **blocks_of_four(prefix_causal=True, hole=False)
    )
    blocks.step.status_table = torch.tensor([0, 1], dtype=torch.int32)
    assert work_of(lambda: run(blocks), monkeypatch) == ["new_empty", "attention"]
    case.step.slot_mapping = torch.tensor([0])
    store = NativeKVStore()
    assert (
        work_of(lambda: store.run(case.problem, case.k, case.v, case.cache, case.step), monkeypatch)
        == ["store_kv"] * 2
    )
