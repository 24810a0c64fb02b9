"""`pymllm run`: where its words may stand, and what goes where."""

from __future__ import annotations

import io
import json
import sys

import pytest

from pymllm.api import shipped_model
from pymllm.cli import main
from pymllm.cli.questions import DEMO_PROMPT, names_a_model
from tests.cli.commands import assert_one_error
from tests.processes import python


def test_run_prints_the_answer_and_nothing_else(llm, capsys):
    assert main(["run", "import os\n", "--max-tokens", "12", "--temperature", "0"]) == 0
    expected = llm.generate("import os\n", llm.default_params(max_tokens=12, temperature=0.0))[0].text
    captured = capsys.readouterr()
    assert captured.out == expected + "\n"
    assert captured.err == (
        "(ended after 12 tokens, the most that were asked for; --max-tokens N gives more)\n"
    )


def test_run_takes_the_options_of_requests(llm, capsys):
    options = ["--prefix-reuse", "off", "--max-model-len", "20", "--kv-memory", "1MB"]
    assert main(["run", "import os\n", "--temperature", "0", "--max-tokens", "50", "--json", *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt_tokens"] + len(answer["token_ids"]) <= 20
    assert_one_error(main(["run", "import os\n" * 9, *options]), capsys.readouterr(), "fewer than 20 tokens")


def test_a_quiet_run_prints_its_answer_alone(capsys):
    assert main(["run", "-q", "--stats", "import os\n", "--max-tokens", "4", "--seed", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out and captured.err == ""


def test_run_stats_go_to_stderr_the_plan_first(capsys):
    assert main(["run", "--stats", "import os\n", "--max-tokens", "4", "--seed", "1"]) == 0
    captured = capsys.readouterr()
    for needle in ("awq int4", "KV cache", "load ", "first ", "prefill ", "decode "):
        assert needle in captured.err and needle not in captured.out
    assert captured.err.index("KV cache") < captured.err.index("import os") < captured.err.index("decode ")


def test_run_json_is_one_object(llm, capsys):
    words = ["run", "import os\n", "--max-tokens", "6", "--seed", "3", "--stop", "zzz", "--json", "--stats"]
    assert main(words) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    expected = llm.generate("import os\n", llm.default_params(max_tokens=6, seed=3, stop=("zzz",)))[0]
    assert answer["text"] == expected.text
    assert answer["token_ids"] == list(expected.token_ids)
    assert answer["finish_reason"] == expected.finish_reason
    assert answer["prompt_tokens"] == len(expected.prompt_token_ids)
    assert answer["sampling"]["repetition_penalty"] == llm.generation_config["repetition_penalty"]
    assert answer["plan"]["weight_bytes"] == llm.plan.totals["weight_bytes"]
    assert answer["speeds"]["decode_tokens_per_second"] > 0


def test_run_reads_its_prompt_from_a_pipe(llm, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("# für\n".encode()), "ascii"))
    assert main(["run", "--max-tokens", "4", "--temperature", "0", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt_tokens"] == len(llm.encode("# für\n"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert main(["run"]) == 2
    assert "UTF-8" in capsys.readouterr().err


def test_run_without_a_prompt_has_one_for_the_shipped_model_alone(llm, monkeypatch, capsys):
    for arguments in ([], ["--demo"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        assert main(["run", "--max-tokens", "2", "--json", *arguments]) == 0
        assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len(llm.encode(DEMO_PROMPT))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert main(["run", str(shipped_model())]) == 2
    assert "no prompt" in capsys.readouterr().err


def test_run_chats_through_the_template(llm, capsys):
    assert main(["run", "--chat", "Hello", "--max-tokens", "3", "--json"]) == 0
    ids = llm.tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len(ids)


def test_run_chats_through_a_template_of_the_users_own(llm, tmp_path, capsys):
    (tmp_path / "my.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    run = ["run", "--chat", "Hello", "--max-tokens", "3", "--json", "--chat-template"]
    for given in (str(tmp_path / "my.jinja"), "<{{ messages[0].content }}>"):
        assert main([*run, given]) == 0
        ids = llm.tokenizer.encode("<Hello>", add_special_tokens=False)
        assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len(ids)
    assert main([*run, str(tmp_path / "missing.jinja")]) == 1
    assert "missing.jinja: the chat template cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "is_model"),
    [
        ("def f(x):", False),
        ("hello", False),
        ("a/b c", False),
        ("/ is a slash", False),
        ("x" * 5000, False),
        ("org/name", True),
        ("Qwen/Qwen3-0.6B", True),
        ("./missing", True),
        ("/missing/folder", True),
        ("~/models", True),
        (str(shipped_model()), True),
    ],
)
def test_a_lone_word_is_a_model_or_a_prompt(word, is_model):
    assert names_a_model(word) == is_model


def test_run_takes_model_and_prompt_in_every_form(llm, capsys):
    folder, prompt = str(shipped_model()), "a/b"
    ids = len(llm.encode(prompt))
    forms = [folder, prompt], [folder, "--prompt", prompt], ["--prompt", prompt]
    for words in (*forms, [folder, "--seed", "1", prompt], ["--seed", "1", folder, prompt]):
        assert main(["run", *words, "--max-tokens", "1", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["prompt_tokens"] == ids


def test_run_without_a_tokenizer_says_what_is_missing(awq, capsys):
    assert_one_error(main(["run", str(awq), "hello"]), capsys.readouterr(), "tokenizer.json")


def test_run_forces_kernels_and_converts_by_rules(capsys):
    words = ["--quant", "**.mlp.**=fp8", "--kernel", "linear=reference", "--max-tokens", "2", "--json"]
    assert main(["run", "x = ", *words]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["kernels"]["linear: reference"] > 1
    assert any("fp8" in method for method in plan["methods"])


@pytest.mark.slow
def test_two_ranks_give_the_text_of_one_once(llm):
    words = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "pymllm",
        "run",
        "--json",
        "import os\n",
    ]
    words += ["--max-tokens", "8", "--temperature", "0", "--tensor-parallel-size", "2"]
    result = python(*words, check=True, OMP_NUM_THREADS="1")
    expected = llm.generate("import os\n", llm.default_params(max_tokens=8, temperature=0.0))[0]
    assert json.loads(result.stdout)["text"] == expected.text
