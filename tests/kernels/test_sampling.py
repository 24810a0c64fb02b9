"""Sampling kernels, every one on every path, against plain formulas in float64 and transformers' logits processors."""

import math
from dataclasses import replace

import pytest
import torch
from transformers.generation import logits_process as hf

from pymllm.kernels.aten.sampling import TorchSampling
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.native.extension import native_available
from pymllm.kernels.native.sampling import NativeSampling
from pymllm.kernels.registry import select
from pymllm.kernels.sampling import PIECE, SETTINGS, SamplingBatch, SamplingProblem

from .integer_cases import PATHS

KERNELS = {"torch": TorchSampling()}
if native_available():
    KERNELS |= {path: NativeSampling(path) for path in PATHS}
NEUTRAL = dict(zip(SETTINGS, (1.0, 0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0), strict=True))
EDGE = 1e-4  # of two that arrive so near to each other, relatively, either may win


@pytest.fixture(params=KERNELS, ids=str)
def kernel(request):
    return KERNELS[request.param]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def batch(settings, bias=None, seen=None):
    """The batch of rows with these settings; bias, seen: a dict of each row."""

    def joined(rows):
        rows = rows or [{}] * len(settings)
        starts = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
        pairs = [pair for row in rows for pair in row.items()]
        tokens = torch.tensor([token for token, _ in pairs], dtype=torch.int64)
        return starts, tokens, torch.tensor([value for _, value in pairs], dtype=torch.float32)

    rows = [[{**NEUTRAL, **row}[name] for name in SETTINGS] for row in settings]
    values = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(SETTINGS))
    return SamplingBatch(values, *joined(bias), *joined(seen))


def probabilities(logits, settings, bias=None, seen=None):
    """What one row's tokens are drawn by, [V] float64: the steps of the contract, one token after the other."""
    s = {**NEUTRAL, **settings}
    values = logits.double().tolist()
    for token, value in (bias or {}).items():
        values[token] += value
    for token, count in (seen or {}).items():
        penalty = s["repetition_penalty"]
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
        values[token] -= s["frequency_penalty"] * count + s["presence_penalty"] * (count > 0)
    values = torch.tensor(values, dtype=torch.float32).double()  # kernels hold float32
    if s["temperature"] == 0:
        return (torch.arange(len(values)) == int(values.argmax())).double()
    x = values / s["temperature"]
    weights = (x - x.max()).exp()
    kept = weights >= s["min_p"] * (1 - 1e-7)
    if 0 < s["top_k"] < len(x):
        kept &= x >= x.sort(descending=True).values[s["top_k"] - 1]
    for share, key in ((s["top_p"], lambda p: -p), (s["typical_p"], typical)):
        if share < 1:
            p = torch.where(kept, weights, 0.0)
            p /= p.sum()
            before, order = 0.0, key(p).argsort(stable=True).tolist()
            for token in order:
                if before >= share:
                    kept[token] = False
                before += float(p[token])
    p = torch.where(kept, weights, 0.0)
    return p / p.sum()


def typical(p):
    information = torch.where(p > 0, -p.log(), math.inf)
    return (information - (p * information).nan_to_num(0).sum()).abs()


def drawn(p, number):
    """The token that wins the two races of the contract, in Python's integers; None: it is too near to another."""
    bits = int(number * 2**53)
    sums = [float(piece.sum()) for piece in p.split(PIECE)]
    piece = winner(bits * 4 + 1, dict(enumerate(sums)))
    if piece is None:
        return None
    begin = piece * PIECE
    return winner(bits * 4 + 2, {begin + i: w for i, w in enumerate(p[begin : begin + PIECE].tolist())})


def winner(state, weights):
    times = []
    for index, weight in weights.items():
        if weight > 0:
            u = (mixed(mixed(state) + (index + 1) * 0x9E3779B97F4A7C15) // 2**11 + 0.5) / 2**53
            times.append((-math.log(u) / weight, index))
    (first, index), *others = sorted(times)
    return None if others and others[0][0] < first * (1 + EDGE) else index


def mixed(z):
    """SplitMix64's finaliser."""
    z %= 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ z // 2**shift) * factor % 2**64
    return z ^ z // 2**31


def numbers(count):
    """As many different numbers as draws are wanted."""
    return torch.rand(count, generator=seeded(23), dtype=torch.float64).tolist()


def check_frequencies(found, p):
    """Each token comes as often as it is likely, within five standard deviations."""
    draws = len(found)
    counts = torch.bincount(torch.tensor(found), minlength=len(p))
    assert not counts[p == 0].any()
    assert ((counts - draws * p).abs() <= 5 * (draws * p * (1 - p)).sqrt() + 1e-9 + (p < 1e-3)).all()


OPTIONS = [
    {},
    {"temperature": 0},
    {"temperature": 0.4},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7, "temperature": 1.5},
    {"top_p": 0.6},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"min_p": 0.15},
    {"min_p": 1.0},
    {"typical_p": 0.3},
    {"typical_p": 0.9},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.01, "typical_p": 0.95, "temperature": 0.7},
    {"top_k": 5, "typical_p": 0.6},
    {"top_p": 0.7, "typical_p": 0.7},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "top_p": 0.9},
    {"frequency_penalty": 0.5, "presence_penalty": -1.0},
    {
        "repetition_penalty": 1.1,
        "frequency_penalty": 1.5,
        "presence_penalty": 0.3,
        "top_k": 20,
        "top_p": 0.95,
    },
]


@pytest.mark.parametrize("size", [1, 17, 64, 65, 1031])
@pytest.mark.parametrize("spread", [0.3, 4.0])
def test_the_token_is_the_formulas_whatever_stands_beside(kernel, size, spread):
    generator = seeded(size)
    settings = [
        {**option, "number": float(torch.rand((), generator=generator))} for option in OPTIONS for _ in "ab"
    ]
    logits = torch.randn(len(settings), size, generator=generator) * spread
    logits[torch.rand(logits.shape, generator=generator) < 0.1] = -torch.inf
    logits[:, 0] = 0.5
    tokens = torch.randint(size, (len(settings), 6), generator=generator).tolist()
    bias = [{token: (-torch.inf, 2.0, -0.5)[token % 3] for token in row[:3] if token} for row in tokens]
    seen = [{token: float(token % 4) for token in row[2:]} for row in tokens]
    penalises = [any("penalty" in name for name in row) for row in settings]
    seen = [row if wanted else {} for row, wanted in zip(seen, penalises, strict=True)]
    untouched = logits.clone()
    found = kernel.choose(logits, batch(settings, bias, seen)).tolist()
    assert torch.equal(logits, untouched)
    compared = 0
    for row, chosen in enumerate(found):
        expected = drawn(
            probabilities(logits[row], settings[row], bias[row], seen[row]), settings[row]["number"]
        )
        if expected is not None:
            assert chosen == expected, settings[row]
            compared += 1
        alone = batch([settings[row]], [bias[row]], [seen[row]])
        assert kernel.choose(logits[row : row + 1], alone).tolist() == [chosen]
    assert compared > len(found) * 0.9


@pytest.mark.parametrize(("size", "spread"), [(4099, 1.0), (9000, 0.01)])
def test_flat_distributions_leave_thousands_of_tokens(kernel, size, spread):
    options = [
        {},
        {"top_p": 0.5},
        {"top_p": 0.97},
        {"top_k": 3000, "top_p": 0.9},
        {"typical_p": 0.4},
        {"min_p": 0.3},
    ]
    logits = torch.randn(1, size, generator=seeded(7)) * spread
    for option in options:
        p, tried = probabilities(logits[0], option), numbers(12)
        rows = batch([{**option, "number": number} for number in tried])
        found = kernel.choose(logits.expand(len(tried), -1), rows).tolist()
        expected = [drawn(p, number) for number in tried]
        # Where thousands of sums are added up, the last token that stays may be another one.
        same = sum(a == b for a, b in zip(found, expected, strict=True))
        assert same >= len(tried) - 1, option


@pytest.mark.parametrize("size", [5, 64, 1031])
def test_a_token_comes_with_its_probability(kernel, size):
    generator = seeded(size)
    settings = [{**option, "number": float(torch.rand((), generator=generator))} for option in OPTIONS]
    logits = torch.randn(len(settings) + 1, size, generator=generator) * 3
    bias = [{1: -torch.inf, 2: 1.5} if row % 2 else {} for row in range(len(settings))]
    logits[-1, 3] = torch.nan
    rows = batch([*settings, {}], [*bias, {}])
    tokens, chances = kernel.propose(logits, rows)
    assert tokens[-1] == -1 and chances[-1].isnan()
    assert torch.equal(tokens, kernel.choose(logits, rows))
    for row, setting in enumerate(settings):
        # Of a likeliest token: among all, as nothing is drawn.
        among = {name: value for name, value in setting.items() if value or name != "temperature"}
        p = probabilities(logits[row], among, bias[row])
        assert chances[row].item() == pytest.approx(p[tokens[row]].item(), rel=1e-5)


def test_tokens_come_as_often_as_they_are_likely(kernel):
    logits = torch.randn(1, 150, generator=seeded(4)) * 1.5
    rows = batch([{"number": number} for number in numbers(20_000)])
    found = kernel.choose(logits.expand(20_000, -1), rows).tolist()
    check_frequencies(found, logits[0].double().softmax(-1))


def test_the_last_bit_of_logits_changes_no_draw(kernel):
    """What stands beside a request may change the last bits of its logits (another kernel for another batch)."""
    logits = torch.randn(4096, 300, generator=seeded(6)) * 2
    rows = batch([{"number": number} for number in numbers(4096)])
    changed = logits * (1 + 2e-7 * torch.randn(logits.shape, generator=seeded(9)).sign())
    assert not torch.equal(logits, changed)
    assert torch.equal(kernel.choose(logits, rows), kernel.choose(changed, rows))


def processed(processors, logits):
    scores = logits[None].clone()
    for processor in processors:
        scores = processor(torch.tensor([[3, 3, 5, 9]]), scores)
    return scores[0]


@pytest.mark.parametrize(
    ("settings", "processors"),
    [
        ({"temperature": 0.6}, [hf.TemperatureLogitsWarper(0.6)]),
        ({"top_k": 6}, [hf.TopKLogitsWarper(6)]),
        ({"top_p": 0.7}, [hf.TopPLogitsWarper(0.7)]),
        ({"min_p": 0.05}, [hf.MinPLogitsWarper(0.05)]),
        ({"typical_p": 0.5}, [hf.TypicalLogitsWarper(0.5)]),
        ({"repetition_penalty": 1.4}, [hf.RepetitionPenaltyLogitsProcessor(1.4)]),
        (
            {"repetition_penalty": 1.2, "temperature": 1.7, "top_k": 20, "top_p": 0.9},
            [
                hf.RepetitionPenaltyLogitsProcessor(1.2),
                hf.TemperatureLogitsWarper(1.7),
                hf.TopKLogitsWarper(20),
                hf.TopPLogitsWarper(0.9),
            ],
        ),
        (
            {"min_p": 0.05, "top_p": 0.8, "typical_p": 0.8},
            [hf.MinPLogitsWarper(0.05), hf.TopPLogitsWarper(0.8), hf.TypicalLogitsWarper(0.8)],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("size", [50, 333])
def test_tokens_and_probabilities_equal_transformers(kernel, settings, processors, size):
    logits = torch.randn(size, generator=seeded(11)) * 1.5
    p = processed(processors, logits).double().softmax(-1)
    count = 4000
    rows = [{**settings, "number": number} for number in numbers(count)]
    seen = [{3: 2.0, 5: 1.0, 9: 1.0} if "repetition_penalty" in settings else {}] * count
    found = kernel.choose(logits.expand(count, -1), batch(rows, seen=seen)).tolist()
    assert int((p > 0).sum()) > 2
    check_frequencies(found, p)


def test_of_equal_logits_the_lower_token_comes_first(kernel):
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0, 1.0, 1.0]])
    tried = numbers(40)

    def support(**settings):
        rows = [{**settings, "number": number} for number in tried]
        return sorted(set(kernel.choose(logits.expand(40, -1), batch(rows)).tolist()))

    assert support(temperature=0) == [1]
    assert support(top_k=2) == [1, 3, 4]  # all that equal the second
    assert support(top_k=4) == [1, 2, 3, 4, 5, 6]
    assert support(min_p=1.0) == [1, 3, 4]
    assert support(top_p=0.3) == [1, 3]  # e^2 / (3 e^2 + 3 e + 1) = 0.235 each
    assert support(top_p=0.75) == [1, 2, 3, 4]
    even = torch.zeros(1, 4).expand(40, -1)
    rows = [{"top_p": 0.5, "number": number} for number in tried]
    assert set(kernel.choose(even, batch(rows)).tolist()) == {0, 1}


def test_masked_tokens_are_never_drawn(kernel):
    logits = torch.full((3, 130), -torch.inf)
    logits[0, 77] = -1e30
    logits[1, [5, 128]] = 3.0
    logits[2, [0, 129]] = torch.tensor([0.0, -200.0])  # e^-200 is no float32
    for number in (0.0, 0.4, 1 - 2**-53):
        rows = [{"temperature": t, "number": number} for t in (1.0, 100.0, 1.0)]
        assert kernel.choose(logits, batch(rows)).tolist() == [
            77,
            drawn(logits[1].double().softmax(-1), number),
            0,
        ]
        cut = [{**row, "top_k": 50, "top_p": 0.99, "typical_p": 0.99, "min_p": 1e-9} for row in rows]
        assert kernel.choose(logits, batch(cut)).tolist()[0::2] == [77, 0]


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-308, 5e-324])
def test_a_tiny_temperature_is_greedy(kernel, temperature):
    logits = torch.tensor([[1.0, 1.0000001, 1.0, -3e38]])
    assert kernel.choose(logits, batch([{"temperature": temperature, "number": 0.9}])).tolist() == [1]


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0}, {"top_k": 3, "top_p": 0.5, "typical_p": 0.5, "min_p": 0.1}]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, "masked"])
@pytest.mark.parametrize("place", [0, 199])
def test_a_row_that_is_not_numbers_gets_no_token_and_the_others_theirs(kernel, settings, bad, place):
    logits = torch.randn(3, 200, generator=seeded(5))
    rows = batch([{**settings, "number": 0.5}] * 3, bias=[{}, {place: -math.inf}, {}])
    fine = kernel.choose(logits, rows).tolist()
    if bad == "masked":
        logits[1] = -torch.inf
    else:
        logits[1, place] = bad
    assert kernel.choose(logits, rows).tolist() == [fine[0], -1, fine[2]]
    chosen, best, values = kernel.log_probabilities(logits, torch.tensor([1, 2, 3]), 4)
    assert chosen.isnan().tolist() == [False, True, False]
    assert values.isnan().all(-1).tolist() == [False, True, False] and best[1].tolist() == [0] * 4


def test_every_token_ruled_out_is_no_token(kernel):
    banned = dict.fromkeys(range(5), -math.inf)
    for settings, other in (({}, drawn(torch.full((5,), 0.2), 0.0)), ({"temperature": 0}, 0)):
        assert kernel.choose(torch.ones(2, 5), batch([settings] * 2, bias=[banned, {}])).tolist() == [
            -1,
            other,
        ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_logits_of_any_float_type_and_of_any_stride(kernel, dtype):
    wide = torch.randn(6, 200, generator=seeded(3)).to(dtype)
    rows = batch([{"number": n / 6, "top_p": 0.9} for n in range(6)])
    for logits in (wide, wide[:, :131], wide.T[:6, :6].T, wide[:, 3:9]):
        assert torch.equal(kernel.choose(logits, rows), kernel.choose(logits.float().contiguous(), rows))
        tokens = torch.arange(6) % logits.shape[1]
        parts = kernel.log_probabilities(logits, tokens, 3)
        again = kernel.log_probabilities(logits.float().contiguous(), tokens, 3)
        assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_a_batch_of_no_rows(kernel):
    assert kernel.choose(torch.empty(0, 7), batch([])).shape == (0,)
    chosen, best, values = kernel.log_probabilities(torch.empty(0, 7), torch.empty(0, dtype=torch.int64), 2)
    assert chosen.shape == (0,) and best.shape == values.shape == (0, 2)


@pytest.mark.parametrize("size", [1, 5, 64, 200, 3001])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_log_probabilities_equal_float64(kernel, size, count):
    logits = (torch.randn(5, size, generator=seeded(2)) * 9).round()  # many are equal
    logits[2, size // 2 + 1 :] = -torch.inf
    tokens = torch.tensor([0, size - 1, 0, size // 2, size // 3])
    chosen, best, values = kernel.log_probabilities(logits, tokens, count)
    exact = logits.double().log_softmax(-1)
    ordered = exact.sort(descending=True, stable=True)
    assert torch.allclose(chosen.double(), exact[range(5), tokens], rtol=1e-6, atol=1e-6)
    assert torch.equal(best, ordered.indices[:, :count])
    assert torch.allclose(values.double(), ordered.values[:, :count], rtol=1e-6, atol=1e-6)


def test_the_number_of_threads_changes_nothing(kernel):
    logits = torch.randn(9, 70000, generator=seeded(8)) * 3
    rows = batch([{**option, "number": 0.37} for option in OPTIONS[:9]])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(kernel.choose(logits, rows).tolist())
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_torch_operations_never_ask_the_device_for_a_value():
    """A tensor on the meta device has none."""
    rows = batch(
        [*OPTIONS, {"number": 0.5}], [{3: 1.0}] * (len(OPTIONS) + 1), [{4: 1.0}] * (len(OPTIONS) + 1)
    )
    logits = torch.empty(len(OPTIONS) + 1, 50, device="meta")
    tokens = TorchSampling().choose(logits, rows)
    assert tokens.device.type == "meta" and tokens.shape == (len(logits),)
    chosen, best, values = TorchSampling().log_probabilities(logits, tokens, 3)
    assert chosen.shape == (len(logits),) and best.shape == values.shape == (len(logits), 3)


@pytest.mark.skipif(not native_available(), reason="needs the native kernels")
def test_the_native_code_gets_no_address_outside_of_a_tensor():
    kernel, logits = NativeSampling(), torch.zeros(2, 5)
    good = [{}, {}]
    with pytest.raises(ValueError, match="outside the vocabulary"):
        kernel.choose(logits, batch(good, bias=[{5: 1.0}, {}]))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        kernel.choose(logits, batch(good, seen=[{}, {-1: 1.0}]))
    with pytest.raises(ValueError, match="must be"):
        kernel.choose(logits, batch([{}]))
    for starts in ([0, 2, 1], [1, 1, 1], [0, 0, 2]):
        rows = replace(batch(good, bias=[{1: 1.0}, {}]), bias_starts=torch.tensor(starts))
        with pytest.raises(ValueError, match="do not rise"):
            kernel.choose(logits, rows)
    with pytest.raises(ValueError, match="must be"):
        kernel.choose(logits[0], batch([{}]))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        kernel.log_probabilities(logits, torch.tensor([0, 5]), 1)


def test_the_best_kernel_of_this_machine_is_chosen_and_the_reference_is_last():
    chosen = select("sampling", SamplingProblem(probe_device("cpu"))).kernel.name
    assert chosen == ("native" if native_available() else "torch")
    assert select("sampling", SamplingProblem(probe_device("cpu")), "torch").kernel.name == "torch"
    on_gpu = select("sampling", SamplingProblem(probe_device("cuda:sm90")))
    assert on_gpu.kernel.name == "torch" and [refusal.kernel for refusal in on_gpu.refused] == ["native"]
