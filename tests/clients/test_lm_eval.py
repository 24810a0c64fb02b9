"""lm_eval's local-completions: a multiple-choice task through the server gives the figures of an offline evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import PYTHON, ROOT

TASK = ROOT / "tests" / "clients" / "lm_eval_task"
QUESTIONS = [json.loads(line) for line in (TASK / "questions.jsonl").read_text().splitlines()]


# Both models are float32: sums of a few numbers, in another order.
ROUNDING = 2e-3


def run(command, **variables):
    # One thread: several wait for each other where cores are few and busy.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def offline():
    """The log-likelihoods of each question's choices, by `LLM.score` and by transformers in float32."""
    return json.loads(run([PYTHON, "tests/clients/offline_scores.py", str(TASK / "questions.jsonl")]))


def evaluate(server, folder, model, task, **settings):
    arguments = {"model": server.model, "tokenizer": str(ROOT / "pymllm" / "shipped_model"), **settings}
    command = [sys.executable, "-m", "lm_eval", "run", "--model", model, "--tasks", task]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--include_path", str(TASK), "--output_path", str(folder), "--log_samples"]
    # Several prompts in one request.
    command += ["--batch_size", "4"] if settings.get("num_concurrent") == 1 else []
    command += ["--apply_chat_template"] if "chat" in model else []
    run(command, OPENAI_API_KEY=server.key, HF_HOME=str(folder / "cache"))
    (figures,) = folder.rglob("results_*.json")
    (samples,) = folder.rglob("samples_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(figures.read_text())["results"][task], sorted(found, key=lambda one: one["doc_id"])


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenized_requests": True, "num_concurrent": 1},
        {"tokenized_requests": False, "num_concurrent": 8},
    ],
    ids=["ids", "texts"],
)
def test_a_multiple_choice_task_has_the_figures_of_an_offline_evaluation(server, tmp_path, offline, settings):
    settings["base_url"] = f"{server.url}/completions"
    figures, samples = evaluate(server, tmp_path, "local-completions", "python_lines", **settings)
    assert len(samples) == len(QUESTIONS) == len(offline["ours"]) == len(offline["formula"])
    served = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    for reference in ("ours", "formula"):
        for one, expected in zip(served, offline[reference], strict=True):
            assert one == pytest.approx(expected, abs=ROUNDING)
    for scores in (offline["ours"], offline["formula"]):
        likeliest = [max(range(4), key=one.__getitem__) for one in scores]
        right = [choice == one["answer"] for choice, one in zip(likeliest, QUESTIONS, strict=True)]
        assert figures["acc,none"] == pytest.approx(sum(right) / len(right))
    # The questions are neither trivial nor a matter of luck, so that a wrong score shows.
    assert 0.5 < figures["acc,none"] < 1


def test_a_generating_task_runs_through_chats(server, tmp_path):
    settings = {"base_url": f"{server.url}/chat/completions", "num_concurrent": 4, "max_gen_toks": 8}
    figures, samples = evaluate(
        server, tmp_path, "local-chat-completions", "python_lines_written", **settings
    )
    assert len(samples) == len(QUESTIONS) and all(isinstance(one["resps"][0][0], str) for one in samples)
    assert 0 <= figures["exact_match,none"] <= 1
