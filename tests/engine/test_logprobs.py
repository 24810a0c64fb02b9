"""Log-probabilities of answers and prompts beside those of transformers' model, and draws beside its probabilities."""

from __future__ import annotations

import pytest
import torch
import transformers

from pymllm import LLM, SamplingParams

from ..checkpoints import write_checkpoint

PROMPTS = [[5, 60, 7, 33, 80, 11, 41], [12, 90, 13]]
TOP = 5


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, "qwen3")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return LLM(folder, dtype="float32", compute="exact", progress=False), model


def expected(model, ids):
    """transformers' log-probabilities after each token, [T, V] float64."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def check_entry(entry, row, token):
    best = row.topk(TOP)
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(float(row[token]), abs=2e-5)
    assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=2e-5)
    for place, (found, value) in enumerate(entry.top):
        assert value == pytest.approx(float(row[found]), abs=2e-5)
        assert found == int(best.indices[place]) or abs(value - float(best.values[place])) < 2e-5


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.3, "seed": 7, "n": 3, "top_k": 40}], ids=str)
def test_log_probabilities_are_transformers(pair, settings):
    """Of greedy and of sampled answers, before temperature and cuts."""
    llm, model = pair
    params = SamplingParams(max_tokens=9, ignore_eos=True, logprobs=TOP, prompt_logprobs=TOP, **settings)
    for prompt, answer in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        for output in answer.outputs:
            rows = expected(model, [*prompt, *output.token_ids])
            for place, token in enumerate(output.token_ids):
                check_entry(output.logprobs[place], rows[len(prompt) + place - 1], token)
            if not settings:
                assert list(output.token_ids) == rows[len(prompt) - 1 : -1].argmax(-1).tolist()
        first, *others = answer.prompt_logprobs
        assert first is None and len(others) == len(prompt) - 1
        for place, entry in enumerate(others):
            check_entry(entry, rows[place], prompt[place + 1])
    assert len({output.token_ids for output in answer.outputs}) == settings.get("n", 1)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7, "top_p": 0.9, "min_p": 0.02}, {"typical_p": 0.8}], ids=str
)
def test_first_tokens_of_many_seeds_come_as_often_as_transformers_would_draw_them(pair, settings):
    """A whole way through the engine: 2,000 answers to one prompt, one seed after the other."""
    llm, model = pair
    settings = {"temperature": 1.0, **settings}
    scores = expected(model, PROMPTS[0])[-1:].float()
    process = transformers.generation.logits_process
    for warper in (
        process.TemperatureLogitsWarper(settings["temperature"]),
        process.MinPLogitsWarper(settings.get("min_p", 0.0)),
        process.TopPLogitsWarper(settings.get("top_p", 1.0)),
        *([process.TypicalLogitsWarper(settings["typical_p"])] if "typical_p" in settings else []),
    ):
        scores = warper(torch.tensor([PROMPTS[0]]), scores)
    p = scores[0].double().softmax(-1)
    draws = 2000
    params = [SamplingParams(max_tokens=1, n=100, seed=100 * i, **settings) for i in range(draws // 100)]
    answers = llm.generate([PROMPTS[0]] * len(params), params)
    tokens = torch.tensor([output.token_ids[0] for answer in answers for output in answer.outputs])
    counts = torch.bincount(tokens, minlength=len(p)).double()
    assert not counts[p == 0].any()
    # Cells that expect few are one; the statistic's own distribution says how far is too far.
    large = p * draws >= 5
    observed = torch.cat((counts[large], counts[~large].sum()[None]))
    wanted = torch.cat((p[large], p[~large].sum()[None])) * draws
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor(len(wanted) - 1.0, dtype=torch.float64)
    assert len(wanted) > 5 and float(torch.special.gammaincc(freedom / 2, statistic / 2)) > 0.001
