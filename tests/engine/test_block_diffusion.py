"""Answers that are decoded by blocks: the plain decoder's, whatever runs beside them, however little room there is."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from pymllm import LLM, SamplingParams
from pymllm.engine.kv_cache import PagedKVCache
from pymllm.engine.outputs import GenerationOutputs
from pymllm.engine.sampling import BLOCK_SETTINGS
from pymllm.errors import RequestError
from pymllm.server.protocol.completions import CompletionRequest

from ..block_checkpoints import write_blocks
from ..checkpoints import load_tensors, save_tensors
from .plain_blocks import Plain

MASK, END = 96, 2
FAMILIES = ("sdar", "llada2_moe", "fast_dllm_qwen")
THRESHOLDS = {"sdar": 0.9, "llada2_moe": 0.95, "fast_dllm_qwen": 0.9}
PROMPTS = [[3 + (5 * i * i + n) % 90 for i in range(n)] for n in (1, 6, 16, 23)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of each family whose answers are sure of some tokens and not of others."""
    found = {}
    for family in FAMILIES:
        made = write_blocks(
            tmp_path_factory.mktemp(family), family, mask_token_id=MASK, eos_token_id=END, hidden_size=64,
            intermediate_size=96, moe_intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
        )  # fmt: skip
        tensors = load_tensors(made.folder)
        tensors["lm_head.weight"] = tensors["lm_head.weight"] * 3.5
        save_tensors(made.folder, tensors)
        made.weights["lm_head.weight"] *= 3.5
        found[family] = made
    return found


@pytest.fixture(scope="module")
def models(folders):
    made = {}

    def model(family, length=8, small=None, **options):
        key = family, length, small, *options.items()
        if key not in made:
            spec = f"block_diffusion:block_length={length}" + (
                f",small_block_length={small}" if small else ""
            )
            made[key] = LLM(folders[family].folder, dtype="float32", strategy=spec, **options)
        return made[key]

    return model


def plain(llm, family):
    """The decoder of a model, over its logits without a cache."""
    strategy = llm.engine.strategy
    small = strategy.small_block_length if family.startswith("fast") else None
    return Plain(llm.logits, strategy.block_length, MASK, {END}, THRESHOLDS[family], small)


def check(output, trajectory, decoder, prompt, params):
    """Compare an answer and its forwards with the plain decoder's."""
    expected = decoder.decode(prompt, params)
    assert decoder.margin > 1e-6, "the case is near a tie, and says nothing"
    assert (list(output.token_ids), output.finish_reason) == expected
    steps = [step for step in trajectory.trajectory if not step.is_prefill]
    # The keys of a final block come with the next block's first step, unless that waits for what they say.
    assert len(steps) == decoder.steps + (decoder.commits if decoder.small else 0)


def fresh(llm, pages=256, reuse=True, step_tokens=1024):
    """Give a model a new, empty cache."""
    llm.engine.prefix_reuse = reuse
    llm.engine.cache = PagedKVCache(llm.model, pages, torch.device("cpu"))
    vars(llm.engine).pop("scheduler", None)
    llm.engine.scheduler.step_tokens = step_tokens
    return llm


SETTINGS = [
    {},
    {"confidence_threshold": 0.3},
    {"confidence_threshold": 1.0},
    {"confidence_threshold": 0.5, "ignore_eos": True},
    {"confidence_threshold": 0.4, "min_tokens": 9},
    {"confidence_threshold": 0.4, "stop_token_ids": (7, 11, 15, 23, 42, 43, 44, 45, 46, 60, 61, 62, 63)},
    {"temperature": 0.8, "seed": 5, "confidence_threshold": 0.4},
    {"temperature": 1.4, "seed": 9, "top_k": 6, "top_p": 0.8, "confidence_threshold": 0.5},
]
UNSHIFTED = [
    {"denoising_steps": 3},
    {"denoising_steps": 1},
    {"denoising_steps": 5, "remasking": "low_confidence_static"},
    {"denoising_steps": 3, "remasking": "sequential"},
    {"confidence_threshold": 0.3, "edit_threshold": 0.4},
    {"confidence_threshold": 0.3, "edit_threshold": 0.0, "max_post_edit_steps": 3},
    {"confidence_threshold": 0.2, "edit_threshold": 0.3, "max_post_edit_steps": 0, "denoising_steps": 2},
    {
        "temperature": 1.0,
        "seed": 3,
        "confidence_threshold": 0.3,
        "edit_threshold": 0.5,
        "max_post_edit_steps": 5,
    },
]


@pytest.mark.parametrize(
    "family, length, small",
    [
        *(("sdar", 4, None), ("sdar", 5, None), ("sdar", 1, None), ("llada2_moe", 20, None)),
        *(("fast_dllm_qwen", length, small) for length, small in ((8, 4), (6, 2), (1, 1), (24, 8))),
    ],
)
def test_answers_and_forwards_are_the_plain_decoder_s(models, family, length, small):
    llm = fresh(models(family, length, small))
    decoder = plain(llm, family)
    settings = [*SETTINGS, *(UNSHIFTED if small is None else ())]
    settings = [s for s in settings if s.get("denoising_steps", 1) <= length]
    numbers = random.Random(length)
    asked = [
        (prompt, SamplingParams(max_tokens=numbers.randint(*((9, 26) if each else (1, 26))), **each))
        for each in settings
        for prompt in numbers.sample(PROMPTS, 2)
    ]
    prompts, params = zip(*asked, strict=True)
    outputs = GenerationOutputs(len(prompts))
    # All settings side by side, some of them reading while others are filled.
    answers = llm.generate(list(prompts), list(params), outputs=outputs)
    for output, trajectory, prompt, each in zip(answers, outputs.trajectories, prompts, params, strict=True):
        check(output, trajectory, decoder, prompt, each)
        assert llm.generate([prompt], each)[0].token_ids == output.token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_see_whole_blocks_and_what_there_is_of_the_last(models, folders, family):
    llm = models(family, 8)
    for count in (1, 7, 8, 9, 21):
        expected = folders[family].logits(torch.tensor(PROMPTS[3][:count]), 8)
        assert torch.allclose(llm.logits(PROMPTS[3][:count]).double(), expected, atol=2e-3)


def test_embedded_texts_see_whole_blocks(models):
    llm = models("sdar", 8)
    hidden = llm.engine.runner.hidden_states([PROMPTS[3], PROMPTS[1]])
    logits = llm.model.compute_logits(hidden, gather_all=True)
    assert torch.allclose(logits, torch.cat([llm.logits(PROMPTS[3]), llm.logits(PROMPTS[1])]), atol=1e-4)


def test_a_request_s_longest_length_need_not_be_whole_blocks(folders):
    length = 12
    options = {"dtype": "float32", "strategy": f"block_diffusion:block_length={length}"}
    params = SamplingParams(max_tokens=None, ignore_eos=True, confidence_threshold=0.3)
    whole = LLM(folders["sdar"].folder, **options).generate([PROMPTS[1]], params)[0].token_ids
    for most in (7, 11, 12, 14, 30):
        llm = LLM(folders["sdar"].folder, max_model_len=most, **options)
        assert llm.plan.kv_cache["max_model_len"] == most
        # The third time a step is recorded, the fourth it is replayed.
        for _ in range(4):
            (output,) = llm.generate([PROMPTS[1]], params)
            assert output.token_ids == whole[: most - len(PROMPTS[1])] and output.finish_reason == "length"
    with pytest.raises(RequestError, match="fewer than 30 tokens"):
        llm.generate([[3] * 30], params)


# Pages, and tokens of a step.
CACHES = ((256, 16), (8, 1024), (8, 1))


@pytest.mark.parametrize(
    "family, length, small", [("sdar", 4, None), ("sdar", 12, None), ("fast_dllm_qwen", 16, 4)]
)
def test_requests_come_go_and_lose_their_pages(models, family, length, small):
    llm, preempted, cached = models(family, length, small), 0, 0
    for seed, (pages, step_tokens) in enumerate(CACHES):
        fresh(llm, pages, seed != 1, step_tokens)
        numbers = random.Random(seed)
        made = []
        for index in range(5):
            prompt = PROMPTS[3][: numbers.randint(1, 23)] + PROMPTS[1][: numbers.choice((0, 0, 5))]
            params = SamplingParams(
                max_tokens=numbers.randint(40, 85),
                ignore_eos=True,
                confidence_threshold=numbers.choice((0.2, 0.5)),
            )
            if small is None and index % 3 == 2:
                params = replace(params, edit_threshold=0.5, max_post_edit_steps=2)
            made.append((numbers.randint(0, 2), prompt, params, index == 3))
        preempted, cached = (
            sum(counts) for counts in zip((preempted, cached), play(llm, family, made), strict=True)
        )
    # Pages that hold whole blocks of 12 come by three: longer than these prompts.
    assert preempted and bool(cached) == (length != 12)


def play(llm, family, made):
    """Run (arrival, prompt, params, whether it is aborted) and compare.  Returns preemptions and cached tokens."""
    cache, scheduler, decoder = llm.engine.cache, llm.engine.scheduler, plain(llm, family)
    line = sorted(enumerate(made), key=lambda entry: entry[1][0])
    streamed: dict[int, list[int]] = {index: [] for index in range(len(made))}
    requests, step = {}, 0
    outputs = GenerationOutputs(len(made))
    with llm.session() as session:
        while line or session.unfinished:
            while line and line[0][1][0] <= step:
                index, (_, prompt, params, _) = line.pop(0)
                requests[session.add(prompt, params, req_id=index)] = index
            stepped = session.step()
            outputs.record_step([request for request, _ in stepped], 0.0)
            for request, piece in stepped:
                streamed[request.req_id] += piece.token_ids if piece is not None else ()
            for request in list(session.unfinished):
                if made[request.req_id][3] and step > made[request.req_id][0] + 3:
                    session.abort(request)
            held = Counter(page for request in scheduler.running for page in request.pages)
            assert [held[page] for page in range(cache.num_pages)] == cache._holders
            assert all(
                request.computed % llm.engine.strategy.block_length == 0 for request in scheduler.running
            )
            step += 1
    assert cache.available == cache.num_pages
    for request, index in requests.items():
        if request.finish_reason != "abort":
            assert request.error is None and streamed[index] == request.answer
            check(request.output(), outputs.trajectories[index], decoder, made[index][1], made[index][2])
    return sum(request.preemptions for request in requests), sum(
        request.cached_tokens for request in requests
    )


@pytest.mark.parametrize("kv_cache", ["int8", "float16"])
def test_a_quantised_cache_changes_nothing_beside_others_or_in_pieces(models, kv_cache):
    llm = models("sdar", 4, kv_cache=kv_cache)
    params = SamplingParams(max_tokens=24, ignore_eos=True, confidence_threshold=0.5)
    alone = [fresh(llm).generate([prompt], params)[0].token_ids for prompt in PROMPTS]
    together = [output.token_ids for output in fresh(llm, 7, step_tokens=4).generate(PROMPTS, params)]
    assert together == alone


def test_a_bad_step_is_one_request_s_matter(models, monkeypatch):
    llm = fresh(models("sdar", 4))
    params = SamplingParams(max_tokens=20, ignore_eos=True, confidence_threshold=0.4)
    expected = [output.token_ids for output in llm.generate(PROMPTS, params)]
    step, bad = llm.engine.runner.step, []

    def fails(batch, cache):
        logits = step(batch, cache)
        if any(request.req_id == 1 and len(request.answer) > 6 for request in batch):
            raise RuntimeError("this one")
        for at, request in enumerate(batch):
            if request.req_id == 2 and len(request.answer) > 9:
                first = sum(len(other.rows) for other in batch[:at])
                logits = logits.clone()
                logits[first] = torch.nan
        return logits

    monkeypatch.setattr(llm.engine.runner, "step", fails)
    with llm.session() as session:
        requests = [session.add(prompt, params, req_id=index) for index, prompt in enumerate(PROMPTS)]
        while session.unfinished:
            bad += [request.req_id for request, _ in session.step() if request.error is not None]
    assert sorted(bad) == [1, 2] and "not numbers" in str(requests[2].error)
    assert [tuple(requests[index].answer) for index in (0, 3)] == [expected[0], expected[3]]
    assert llm.engine.cache.available == llm.engine.cache.num_pages


@pytest.mark.parametrize("family, small", [("sdar", None), ("fast_dllm_qwen", 4)])
def test_log_probabilities_are_those_of_the_step_that_took_the_token(models, family, small):
    llm = models(family, 8, small)
    decoder = plain(llm, family)
    for each in ({}, {"temperature": 0.9, "seed": 1}) + (() if small else ({"edit_threshold": 0.3},)):
        params = SamplingParams(max_tokens=15, ignore_eos=True, logprobs=3, confidence_threshold=0.4, **each)
        (output,) = llm.generate([PROMPTS[1]], params)
        assert decoder.decode(PROMPTS[1], params)[0] == list(output.token_ids)
        assert [entry.token_id for entry in output.logprobs] == list(output.token_ids)
        expected = [decoder.chances[len(PROMPTS[1]) + at] for at in range(15)]
        assert [entry.logprob for entry in output.logprobs] == pytest.approx(expected, abs=1e-3)
        assert all(len(entry.top) == 3 and MASK not in dict(entry.top) for entry in output.logprobs)


def test_limits_end_an_answer_before_its_first_open_position(models):
    llm = models("sdar", 8)
    outputs = GenerationOutputs(1)
    whole = llm.generate([PROMPTS[1]], SamplingParams(max_tokens=40, ignore_eos=True), outputs=outputs)[0]
    steps = [step for step in outputs.trajectories[0].trajectory if not step.is_prefill]
    for most in (1, 3, len(steps) - 1, len(steps)):
        outputs = GenerationOutputs(1)
        params = SamplingParams(max_tokens=40, ignore_eos=True, max_nfe=most)
        (output,) = llm.generate([PROMPTS[1]], params, outputs=outputs)
        (trajectory,) = outputs.trajectories
        count = len(output.token_ids)
        assert output.token_ids == whole.token_ids[:count] and output.finish_reason == "length"
        ended = most < len(steps)
        assert (trajectory.max_nfe_reached, trajectory.max_new_tokens_reached) == (ended, not ended)
        assert not trajectory.max_model_len_reached and output.prefill_seconds >= 0
        last = [step for step in trajectory.trajectory if not step.is_prefill][-1]
        assert len(trajectory.trajectory) - sum(s.is_prefill for s in trajectory.trajectory) == most
        open_ = last.block_trace[-1]["num_mask_tokens"]
        assert ended == (open_ > 0 or count < 40)

    params = SamplingParams(max_tokens=40, ignore_eos=True, remasking="sequential", max_repetition_run=2)
    outputs = GenerationOutputs(1)
    (output,) = llm.generate([PROMPTS[1]], params, outputs=outputs)
    (free,) = llm.generate([PROMPTS[1]], replace(params, max_repetition_run=None))
    pairs = [at for at in range(1, 40) if free.token_ids[at] == free.token_ids[at - 1]]
    assert pairs, "the case has no run"
    assert output.token_ids == free.token_ids[: pairs[0] + 1]
    assert outputs.trajectories[0].max_repetition_run_reached and output.finish_reason == "length"


def test_a_trace_has_the_blocks_after_each_step(models):
    llm, outputs = fresh(models("sdar", 4)), GenerationOutputs(1)
    prompt, params = PROMPTS[1], SamplingParams(max_tokens=7, ignore_eos=True, remasking="sequential")
    (output,) = llm.generate([prompt], params, outputs=outputs)
    read, *steps = outputs.trajectories[0].trajectory
    assert read.is_prefill and read.running_token_ids == prompt[:4] and read.num_generated_tokens == 0
    assert read.block_trace[0] == {
        **{"block_id": 1, "is_active": False, "is_dummy": True, "num_mask_tokens": 2},
        **{"mask_ratio": 0.5, "progress": 0.5, "block_status": "DUMMY"},
    }
    # Two places of the first block, four of the second, one below the limit in the third.
    assert [step.num_generated_tokens for step in steps] == [1] * 7 and outputs.tpf == 1.0
    assert steps[0].running_token_ids == [*prompt[4:], MASK, MASK] and steps[0].block_size == 4
    assert [step.buffer_bids for step in steps] == [[1], [1], [1, 2], [2], [2], [2], [2, 3]]
    assert steps[2].running_token_ids == [*prompt[4:], *output.token_ids[:2], *[MASK] * 4]
    states = [[block["block_status"] for block in step.block_trace] for step in steps]
    active, full, both = ["ACTIVE"], ["TO_CACHE"], ["IN_CACHE", "ACTIVE"]
    assert states == [active, full, both, active, active, full, both]
    assert outputs.generated_tokens == 7 and outputs.prefill_tokens == 4
    assert (output.metrics.steps, output.metrics.forwards, output.metrics.tpf) == (8, 7, 1.0)


def test_positions_behind_the_limit_are_filled_and_not_counted(models):
    llm, outputs = models("sdar", 4), GenerationOutputs(1)
    params = SamplingParams(max_tokens=7, ignore_eos=True, denoising_steps=1)
    llm.generate([PROMPTS[1]], params, outputs=outputs)
    assert [step.num_generated_tokens for step in outputs.trajectories[0].trajectory] == [0, 2, 4, 1]
    assert outputs.tpf == 7 / 3


def test_editing_streams_finished_blocks_alone(models):
    llm = models("sdar", 8)
    params = SamplingParams(max_tokens=30, ignore_eos=True, confidence_threshold=0.3, edit_threshold=0.2)
    pieces = list(llm.stream(PROMPTS[1], params))
    assert [len(piece.token_ids) for piece in pieces] == [2, 8, 8, 8, 4]
    assert sum((piece.token_ids for piece in pieces), ()) == pieces[-1].output.token_ids


@pytest.mark.parametrize("family, small", [("sdar", None), ("fast_dllm_qwen", 4), ("fast_dllm_qwen", 1)])
@pytest.mark.parametrize("rest", [(20, MASK, 22), (MASK,), (MASK, 21, MASK, 23, 24), (MASK, MASK)])
def test_a_block_may_hold_masks_of_the_prompt_which_are_filled_in(models, family, small, rest):
    llm = fresh(models(family, 8, small))
    prompt = [5, 6, MASK, 8, 9, 10, 11, 12, *rest]
    decoder = plain(llm, family)
    for least in (0.6, 0.6, 0.2):
        params = SamplingParams(max_tokens=18, ignore_eos=True, confidence_threshold=least)
        outputs = GenerationOutputs(1)
        (output,) = llm.generate([prompt], params, outputs=outputs)
        check(output, outputs.trajectories[0], decoder, prompt, params)
        assert output.prompt_token_ids == (*decoder.text[: len(prompt)],) and MASK in prompt[8:]


def test_a_mask_of_the_prompt_may_become_an_end_token(models, monkeypatch):
    llm = fresh(models("sdar", 8))
    prompt = [5, 6, MASK, 8]
    (first,) = llm.generate([prompt], SamplingParams(max_tokens=4))
    # What came there, as the model's end token.
    end = first.prompt_token_ids[2]
    monkeypatch.setattr(llm.engine, "end_tokens", frozenset({end}))
    decoder = plain(llm, "sdar")
    decoder.ends = {end}
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=4))
    assert (list(output.token_ids), output.finish_reason) == decoder.decode(
        prompt, SamplingParams(max_tokens=4)
    )
    assert output.prompt_token_ids == first.prompt_token_ids


def test_pages_do_not_hold_masks_that_were_filled_in_while_a_request_waited(models):
    llm = fresh(models("sdar", 16))
    params, lost = SamplingParams(max_tokens=20, ignore_eos=True), 0
    for first in range(3, 40):
        prompt = [*range(first, first + 14), MASK]
        with llm.session() as session:
            request = session.add(prompt, params)
            while session.unfinished:
                session.step()
                block = request.decoding.block
                if (
                    request.answer
                    and block.block_id == 0
                    and block.num_mask_tokens
                    and not request.preemptions
                ):
                    # Its first page has all its tokens now, but for one of the prompt's.
                    llm.engine.scheduler._preempt(request)
                    lost += 1
        text = [*prompt, request.answer[0], 50, 51]
        (found,) = llm.generate([text], params)
        assert list(found.token_ids) == plain(llm, "sdar").decode(text, params)[0]
    assert lost


@pytest.fixture(scope="module")
def words():
    """The shipped model, which has a tokenizer, decoded by blocks although it was not trained for that."""
    return LLM(strategy="block_diffusion:block_length=8,mask_token_id=0")


def test_stop_strings_and_text_work_within_a_step(words):
    prompt = "def add(first, second):\n"
    (whole,) = words.generate([prompt], SamplingParams(max_tokens=40, confidence_threshold=0.3))
    assert whole.text == words.tokenizer.decode(list(whole.token_ids))
    stop = '"' * 10
    pieces = list(words.stream(prompt, SamplingParams(max_tokens=40, confidence_threshold=0.3, stop=(stop,))))
    assert "".join(piece.text for piece in pieces) == whole.text[: whole.text.index(stop)]
    assert pieces[-1].output.finish_reason == "stop" and len(pieces[-1].token_ids) > 1
    assert words.engine.cache.available == words.engine.cache.num_pages


def test_what_has_no_meaning_is_refused_by_its_name(models, words):
    for name, value in (
        *(("min_p", 0.1), ("typical_p", 0.9), ("repetition_penalty", 1.1), ("frequency_penalty", 0.5)),
        *(("presence_penalty", 0.5), ("logit_bias", {3: 1.0}), ("bad_words", "no"), ("prompt_logprobs", 1)),
        *(("json_schema", True), ("regex", "a+"), ("grammar", 'start: "a"')),
        *(
            ("denoising_steps", 2),
            ("remasking", "sequential"),
            ("edit_threshold", 0.5),
            ("max_post_edit_steps", 1),
        ),
    ):
        with pytest.raises(RequestError, match=f"^.*{name}") as caught:
            words.generate(["a"], SamplingParams(max_tokens=4, **{name: value}))
        assert caught.value.tensor == name
        if name in BLOCK_SETTINGS:
            models("sdar", 8).generate([PROMPTS[0]], SamplingParams(max_tokens=1, **{name: value}))
    with pytest.raises(RequestError, match=r"denoising_steps .* 1 to 8"):
        models("sdar", 8).generate([PROMPTS[0]], SamplingParams(denoising_steps=9))


@pytest.mark.parametrize(
    "name, bad, good",
    [
        ("denoising_steps", (0, 1.5, True, "2"), 2),
        ("confidence_threshold", (0, 1.01, float("nan"), "1"), 1.0),
        ("remasking", ("random", 1, ["sequential"]), "sequential"),
        ("edit_threshold", (-0.1, 1.1, True), 0.0),
        ("max_post_edit_steps", (-1, 0.5), 0),
        ("max_nfe", (0, 2.5), 4),
        ("max_repetition_run", (0, "3"), 3),
    ],
)
def test_settings_are_checked_and_of_no_use_to_other_models(name, bad, good, llm):
    for value in bad:
        with pytest.raises(RequestError) as caught:
            SamplingParams(**{name: value})
        assert caught.value.tensor == name and name in str(caught.value)
    params = SamplingParams(max_tokens=2, **{name: good})
    with pytest.raises(RequestError, match=f"{name} has no use where answers are decoded by autoregressive"):
        llm.generate([[3]], params)
    assert CompletionRequest(prompt="a", **{name: good}).sampling()[name] == good


@pytest.fixture(scope="module")
def llm():
    return LLM()


def test_the_checkpoint_s_recommendation_leaves_out_what_cannot_be_done(models):
    llm = models("sdar", 8)
    recommended = {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "min_p": 0.1,
    }
    before, llm.generation_config = llm.generation_config, recommended
    try:
        params = llm.default_params(max_tokens=3)
    finally:
        llm.generation_config = before
    assert (params.temperature, params.top_k, params.repetition_penalty, params.min_p) == (0.7, 20, 1.0, 0.0)
    assert len(llm.generate([PROMPTS[0]], replace(params, ignore_eos=True))[0].token_ids) == 3
