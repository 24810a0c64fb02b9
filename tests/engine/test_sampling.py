"""The next tokens of a step's requests: what is asked for together, what each gets, and where chance comes from."""

import math

import pytest
import torch
from transformers.generation.logits_process import NoBadWordsLogitsProcessor

from pymllm import LLM, SamplingParams
from pymllm.engine.choosing import SamplerState, SeenTokens, choose, describe, uniform
from pymllm.engine.outputs import GenerationOutputs
from pymllm.errors import KernelError, RequestError
from pymllm.kernels.aten.sampling import TorchSampling
from pymllm.kernels.native.extension import native_available
from pymllm.kernels.native.sampling import NativeSampling

KERNELS = [TorchSampling(), *([NativeSampling()] if native_available() else [])]
PROMPT = "def read_lines(path):\n"


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.name)
def kernel(request):
    return request.param


@pytest.fixture(scope="module")
def llm():
    return LLM(dtype="float32")


def tokens_of(logits, states, answers, kernel):
    return [token for token, _ in choose(logits, states, answers, kernel)]


def p_value(counts, expected):
    """Of a chi-square test; cells that expect fewer than 5 are put together."""
    counts, expected = counts.double(), expected.double()
    small = expected < 5
    counts = torch.cat((counts[~small], counts[small].sum()[None]))
    expected = torch.cat((expected[~small], expected[small].sum()[None]))
    used = expected > 0
    assert int(counts[~used].sum()) == 0  # nothing impossible comes
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum()
    freedom = torch.tensor(float(int(used.sum()) - 1), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (3, 1000), (8, 32000)])
def test_greedy_requests_get_the_first_of_the_highest_logits(shape, kernel):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1)).round()  # many are equal
    expected = [int((row == row.max()).nonzero()[0]) for row in logits]
    answers = [[]] * shape[0]
    for params in (SamplingParams(), SamplingParams(logprobs=0)):
        assert tokens_of(logits, [SamplerState(params, [0])] * shape[0], answers, kernel) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"logprobs": 2}])
def test_a_row_that_is_not_numbers_has_no_token(bad, settings, kernel):
    logits = torch.eye(3)
    logits[1] = bad
    states = [SamplerState(SamplingParams(**settings, top_k=1), [0])] * 3
    assert choose(logits, states, [[]] * 3, kernel)[1] == (None, None)
    assert tokens_of(logits, states, [[]] * 3, kernel) == [0, None, 2]


def test_each_request_of_a_step_gets_what_it_asks_for(kernel):
    logits = torch.randn(5, 70, generator=torch.Generator().manual_seed(4))
    params = [
        SamplingParams(),
        SamplingParams(logprobs=0),
        SamplingParams(logprobs=3, temperature=0.5, seed=1),
        SamplingParams(logit_bias={9: 100}),
        SamplingParams(logprobs=2, presence_penalty=2.0),
    ]
    answers = [[], [1], [2, 3], [], [int(logits[4].argmax())]]
    found = choose(logits, [SamplerState(p, [1]) for p in params], answers, kernel)
    exact = logits.double().log_softmax(-1)
    best = exact.sort(descending=True)
    assert [found[0][0], found[1][0], found[3][0]] == [int(best.indices[0, 0]), int(best.indices[1, 0]), 9]
    assert found[4][0] == int(best.indices[4, 1])
    for row, (token, entry) in enumerate(found):
        count = params[row].logprobs
        assert (entry is None) == (count is None)
        if count is not None:
            assert entry.token_id == token
            assert entry.logprob == pytest.approx(float(exact[row, token]), abs=1e-5)
            assert [t for t, _ in entry.top] == best.indices[row, :count].tolist()
            assert [v for _, v in entry.top] == pytest.approx(best.values[row, :count].tolist(), abs=1e-5)


def test_the_random_number_is_the_seeds_and_the_places_alone():
    # SplitMix64's own first outputs for the seed 1234567 (its reference program).
    from pymllm.engine.choosing import _mixed

    golden, state = 0x9E3779B97F4A7C15, 1234567
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [_mixed(state + golden * (place + 1)) for place in range(3)] == known
    assert uniform(5, 3) == uniform(5, 3) != uniform(5, 4)
    assert uniform(-1, 0) == uniform(2**64 - 1, 0) != uniform(1, 0)
    numbers = torch.tensor([uniform(seed, place) for seed in range(200) for place in range(100)])
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    cells = (numbers * 16).long().reshape(200, 100)
    even = torch.full((256,), 19800 / 256)
    assert p_value(torch.bincount((cells * 1).flatten(), minlength=16), torch.full((16,), 1250.0)) > 0.001
    in_a_row = (cells[:, 1:] * 16 + cells[:, :-1]).flatten()  # places side by side
    beside = (cells[1:] * 16 + cells[:-1]).flatten()  # seeds side by side
    assert p_value(torch.bincount(in_a_row, minlength=256), even) > 0.001
    assert p_value(torch.bincount(beside, minlength=256), torch.full((256,), 19900 / 256)) > 0.001


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 5}, {"min_p": 0.2}, {"top_p": 0.6}, {"top_k": 9, "min_p": 0.01, "top_p": 0.9}],
    ids=str,
)
def test_tokens_come_as_often_as_their_probabilities_say(settings, kernel):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 1.5
    x = logits.double() / 0.8
    p = x.softmax(-1)
    if "top_k" in settings:
        x[x < x.sort(descending=True).values[settings["top_k"] - 1]] = -torch.inf
    if "min_p" in settings:
        x[p < settings["min_p"] * p.max()] = -torch.inf
    if "top_p" in settings:
        order = x.softmax(-1).sort(descending=True)
        x[order.indices[order.values.cumsum(-1) - order.values >= settings["top_p"]]] = -torch.inf
    draws = 6000
    params = SamplingParams(temperature=0.8, seed=8, **settings)
    answers = [range(place) for place in range(draws)]  # only their lengths matter
    tokens = tokens_of(logits.expand(draws, -1), [SamplerState(params, [0])] * draws, answers, kernel)
    assert p_value(torch.bincount(torch.tensor(tokens), minlength=40), x.softmax(-1) * draws) > 0.001


def test_seen_tokens_follow_an_answer():
    seen = SeenTokens([4, 9, 4])
    for answer in ([], [9], [9, 7, 7], [9, 7, 7, 4]):
        seen.follow(answer)
    assert dict(zip(seen.tokens, seen.counts, strict=True)) == {4: 1.0, 9: 1.0, 7: 2.0}


@pytest.mark.parametrize("answer", [[], [5], [1, 2], [1, 2, 3], [2, 3], [7, 1]])
def test_bad_words_ban_what_transformers_bans(answer, kernel):
    words, prompt = ((4,), (1, 2, 3), (2, 3), (8, 8), (6, 7, 1, 5)), [8, 6, 7]
    scores = torch.zeros(1, 10)
    processor = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=[])
    allowed = (processor(torch.tensor([prompt + answer]), scores) == 0).nonzero()[:, 1].tolist()
    state = SamplerState(SamplingParams(bad_words=("x",), temperature=1.0), prompt, words)
    states = [SamplerState(state.params, prompt, words) for _ in range(200)]
    assert sorted(set(tokens_of(scores.expand(200, -1), states, [answer] * 200, kernel))) == allowed


def test_prompt_rows_that_are_not_numbers_are_an_error(kernel):
    with pytest.raises(KernelError, match="not numbers"):
        describe(torch.tensor([[0.0, 1.0], [math.nan, 1.0]]), [0, 1], 1, kernel)


def sampled(**settings):
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 12, "seed": 3, **settings})


def test_equal_seeds_give_equal_answers_whatever_runs_beside(llm):
    alone = [llm.generate(PROMPT, sampled(seed=seed))[0].token_ids for seed in (3, 4)]
    others = [
        sampled(seed=None, temperature=1.3),
        SamplingParams(max_tokens=5),
        sampled(seed=9, top_p=0.5, logprobs=3),
    ]
    prompts = ["import os\n", PROMPT, "x", PROMPT, "class A:\n"]
    together = llm.generate(prompts, [others[0], sampled(), others[1], sampled(seed=4), others[2]])
    assert [together[1].token_ids, together[3].token_ids] == alone
    assert alone[0] != alone[1]


def test_both_kernels_give_the_same_answers(llm):
    reference = LLM(dtype="float32", kernels={"sampling": "torch"})
    assert reference.engine.sampling_kernel.name == "torch"
    params = [
        sampled(top_p=0.9, repetition_penalty=1.2),
        sampled(typical_p=0.8, min_tokens=5, logprobs=2),
        sampled(top_k=30, frequency_penalty=1.0, presence_penalty=0.5, min_p=0.02),
    ]
    found = [[o.token_ids for o in one.generate([PROMPT] * 3, params)] for one in (llm, reference)]
    assert found[0] == found[1]


def test_n_answers_are_those_of_seeds_in_a_row(llm):
    answers = llm.generate([PROMPT, "x"], [sampled(n=3, seed=2**64 - 2), sampled()])
    assert len(answers) == 2 and len(answers[0].outputs) == 3 and len(answers[1].outputs) == 1
    alone = [llm.generate(PROMPT, sampled(seed=seed))[0] for seed in (2**64 - 2, 2**64 - 1, 0)]
    assert [o.token_ids for o in answers[0].outputs] == [o.token_ids for o in alone]
    assert len({o.token_ids for o in answers[0].outputs}) == 3
    free = llm.generate(PROMPT, sampled(n=3, seed=None))[0]
    assert len({o.token_ids for o in free.outputs}) == 3


def test_a_stream_of_n_answers_gives_each_by_its_index(llm):
    whole = llm.generate([PROMPT, "x"], sampled(n=3, seed=7))
    texts, finished = {}, {}
    for place, piece in llm.stream_all([PROMPT, "x"], sampled(n=3, seed=7)):
        assert (place, piece.index) not in finished
        texts[place, piece.index] = texts.get((place, piece.index), "") + piece.text
        if piece.output is not None:
            finished[place, piece.index] = piece.output
    expected = {(place, index): o for place, of in enumerate(whole) for index, o in enumerate(of.outputs)}
    assert {key: output.token_ids for key, output in finished.items()} == {
        key: output.token_ids for key, output in expected.items()
    }
    assert texts == {key: output.text for key, output in expected.items()}
    assert {piece.index for piece in llm.stream(PROMPT, sampled(n=2))} == {0, 1}
    with pytest.raises(RequestError, match="trajectory"):
        llm.stream(PROMPT, sampled(n=2), outputs=GenerationOutputs(1))


def test_min_tokens_puts_every_end_off(llm):
    first = llm.generate(PROMPT, SamplingParams(max_tokens=12))[0]
    end = first.token_ids[2]
    assert len(llm.generate(PROMPT, SamplingParams(stop_token_ids=[end]))[0].token_ids) == 3
    later = llm.generate(PROMPT, SamplingParams(stop_token_ids=[end], min_tokens=5, max_tokens=12))[0]
    assert end not in later.token_ids[:5] and len(later.token_ids) >= 5
    # A stop string that comes too early is part of the answer.
    stop = first.text[1:4]
    assert (
        llm.generate(PROMPT, SamplingParams(stop=stop, max_tokens=12))[0].text
        == first.text[: first.text.index(stop)]
    )
    longer = llm.generate(PROMPT, SamplingParams(stop=stop, min_tokens=9, max_tokens=12))[0]
    assert longer.text.startswith(first.text[: first.text.index(stop) + len(stop)])
    assert len(longer.token_ids) >= 9
    # The end is as likely as can be, and still does not come.
    forced = {"logit_bias": {token: 100 for token in llm.engine.end_tokens}}
    assert len(llm.generate(PROMPT, SamplingParams(**forced))[0].token_ids) == 1
    assert len(llm.generate(PROMPT, SamplingParams(**forced, min_tokens=4))[0].token_ids) == 5


def test_bad_words_do_not_come(llm):
    text = llm.generate(PROMPT, SamplingParams(max_tokens=30))[0].text
    word = next(word for word in text.split() if len(word) > 3 and word.isalpha())
    without = llm.generate(PROMPT, SamplingParams(max_tokens=30, bad_words=[word]))[0].text
    assert word not in without.split() and without != text


def test_prompt_logprobs_are_those_of_the_logits(llm, monkeypatch):
    ids = llm.encode(PROMPT * 4)
    exact = llm.logits(ids).double().log_softmax(-1)
    params = SamplingParams(max_tokens=3, prompt_logprobs=2)
    whole = llm.generate(ids, params)[0]
    monkeypatch.setattr(llm.engine.scheduler, "step_tokens", 7)
    beside = llm.generate([ids, "x", ids], [params, SamplingParams(max_tokens=9), params])
    for output in (whole, beside[0], beside[2]):
        first, *entries = output.prompt_logprobs
        assert first is None and [entry.token_id for entry in entries] == ids[1:]
        for place, entry in enumerate(entries):
            best = exact[place].topk(2)
            assert entry.logprob == pytest.approx(float(exact[place, ids[place + 1]]), abs=1e-4)
            assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert output.token_ids == whole.token_ids
    assert beside[1].prompt_logprobs is None


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 1}], ids=str)
def test_only_the_request_whose_logits_are_no_numbers_fails(llm, monkeypatch, settings):
    params = SamplingParams(max_tokens=6, **settings)
    expected = [llm.generate(prompt, params)[0].token_ids for prompt in ("x", "import os\n")]
    inner = llm.engine.runner.step

    def step(requests, cache):
        logits = inner(requests, cache).clone()
        for row, request in enumerate(requests):
            if request.req_id == 1 and len(request.answer) == 2:
                logits[row, 5] = math.nan
        return logits

    monkeypatch.setattr(llm.engine.runner, "step", step)
    ended = {}
    with llm.session() as session:
        for index, prompt in enumerate(("x", PROMPT, "import os\n")):
            session.add(llm.encode(prompt), params, None, index)
        while session.unfinished:
            for request, _ in session.step():
                if request.finish_reason:
                    ended[request.req_id] = request
    assert [ended[0].answer, ended[2].answer] == [list(tokens) for tokens in expected]
    assert isinstance(ended[1].error, KernelError) and len(ended[1].answer) == 2
    assert "not numbers" in str(ended[1].error)


@pytest.mark.parametrize(
    "settings",
    [
        {"n": 0},
        {"n": 10**9},
        {"min_tokens": -1},
        {"min_tokens": 9, "max_tokens": 8},
        {"typical_p": 0},
        {"typical_p": 1.5},
        {"top_k": -2},
        {"prompt_logprobs": 21},
        {"bad_words": [""]},
        {"bad_words": ["x"] * 1000},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": ["a"]},
        {"stop_token_ids": [1] * 5000},
    ],
    ids=str,
)
def test_settings_out_of_range_name_the_parameter(settings):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**settings)
    assert caught.value.tensor == next(iter(settings))


def test_top_k_of_minus_one_asks_for_nothing():
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
