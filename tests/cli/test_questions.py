"""What `pymllm run` asks, and what it refuses before a tensor is read."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest

import pymllm.api.llm
from pymllm.api import LLM, shipped_model
from pymllm.cli import main
from pymllm.cli.run import why_cut
from pymllm.cli.run_lines import read_lines
from pymllm.engine.request import RequestOutput
from pymllm.engine.sampling import SamplingParams
from pymllm.errors import ConfigError
from tests.cli.commands import assert_one_error


@pytest.fixture
def talker(tmp_path):
    """The shipped model elsewhere: a folder with a template like any other."""
    return shutil.copytree(shipped_model(), tmp_path / "talker")


@pytest.fixture
def unread(monkeypatch):
    """Make it a failure to read a tensor."""

    def load(*given, **named):
        raise AssertionError("tensors were read")

    monkeypatch.setattr(pymllm.api.llm, "load_prepared", load)


def run_json(capsys, *words):
    assert main(["run", *map(str, words), "--max-tokens", "2", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_model_with_a_template_chats_unless_raw(llm, talker, capsys):
    def chat(*messages):
        return len(llm.tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in messages]))

    raw = len(llm.encode("Hi"))
    assert run_json(capsys, talker, "Hi")["prompt_tokens"] == chat(("user", "Hi")) != raw
    assert run_json(capsys, talker, "Hi", "--raw")["prompt_tokens"] == raw
    both = run_json(capsys, talker, "Hi", "--system", "Be brief")
    assert both["prompt_tokens"] == chat(("system", "Be brief"), ("user", "Hi")) and both["chat"]
    assert run_json(capsys, shipped_model(), "Hi")["prompt_tokens"] == raw


def test_thinking_is_a_variable_of_the_template(llm, capsys):
    template = "{% if enable_thinking %}think{% else %}x{% endif %}{{ messages[0].content }}"
    for thinking, text in (("on", "thinkHi"), ("off", "xHi")):
        found = run_json(capsys, "Hi", "--chat-template", template, "--thinking", thinking)
        assert found["prompt_tokens"] == len(llm.encode(text))


def test_a_file_and_a_pipe_come_before_the_prompt(llm, tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("a = 1\n")
    joined = len(llm.encode("a = 1\n\nb"))
    assert run_json(capsys, "b", "--prompt-file", tmp_path / "notes.txt")["prompt_tokens"] == joined
    with open(tmp_path / "notes.txt") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run_json(capsys, "b")["prompt_tokens"] == joined
    with open(tmp_path / "notes.txt") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run_json(capsys, "--prompt-file", "-")["prompt_tokens"] == len(llm.encode("a = 1\n"))
    with open(os.devnull) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run_json(capsys, "b")["prompt_tokens"] == len(llm.encode("b"))


def test_a_byte_order_mark_is_no_part_of_a_prompt(llm, tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("a = 1", encoding="utf-8-sig")
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a = 1", "max_tokens": 1}', encoding="utf-8-sig")
    expected = len(llm.encode("a = 1"))
    assert run_json(capsys, "--prompt-file", tmp_path / "notes.txt")["prompt_tokens"] == expected
    with open(tmp_path / "notes.txt") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run_json(capsys, "--prompt-file", "-")["prompt_tokens"] == expected
    assert main(["run", "--batch", str(tmp_path / "lines.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == expected


def test_token_ids_need_no_tokenizer(awq, capsys):
    for ids in ("1,2,3", "[1, 2, 3]"):
        assert run_json(capsys, awq, "--prompt-ids", ids)["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("words", "needle"),
    [
        (["hello"], "tokenizer.json"),
        (["--chat", "hello"], "no chat template"),
        (["--prompt-ids", "1,99999"], "outside the vocabulary"),
        (["--prompt-ids", ",".join("1" * 9), "--max-model-len", "8"], "maximum context length is 8"),
        (["--prompt-ids", "1", "--temperature", "-1"], "temperature"),
        (["--prompt-ids", "1", "--tokenizer", "/missing/tokenizer"], "no tokenizer '/missing/tokenizer'"),
        (["--prompt-ids", "1", "--tokenizer", str(shipped_model())], "tokens that the model does not have"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_tensor_is_read(words, needle, awq, unread, capsys):
    assert_one_error(main(["run", str(awq), *words]), capsys.readouterr(), needle)


@pytest.mark.parametrize("broken", ["tokenizer.json", "chat_template.jinja"])
def test_broken_text_files_are_refused_before_a_tensor_is_read(broken, talker, unread, capsys):
    (talker / broken).write_text("{% if")
    assert_one_error(main(["run", str(talker), "hello"]), capsys.readouterr(), broken)


def test_a_misspelt_path_is_named_with_what_is_like_it(talker, capsys):
    captured = main(["run", f"{talker}s"]), capsys.readouterr()
    assert_one_error(*captured, "neither a local folder")
    assert f"Nearest in {talker.parent}: talker." in captured[1].err


@pytest.mark.parametrize(
    "words",
    [
        ["x", "--raw", "--chat"],
        ["x", "--raw", "--system", "y"],
        ["x", "--prompt-ids", "1", "--thinking", "on"],
        ["--prompt-ids", "1,a"],
        ["--prompt-ids", ""],
        ["x", "--output", "y"],
        ["--batch", "x.jsonl", "--json"],
        ["--prompt-file", "/missing/file"],
    ],
)
def test_options_that_contradict_each_other_are_wrong_usage(words, capsys):
    assert main(["run", *words]) == 2
    assert "error:" in capsys.readouterr().err


def test_an_answer_that_fills_the_context_is_told_from_one_of_max_tokens():
    output = RequestOutput(
        prompt_token_ids=[1] * 6,
        token_ids=(1, 2),
        text="",
        finish_reason="length",
        prefill_seconds=0.0,
        decode_seconds=0.0,
    )
    assert "--max-tokens" in why_cut(output, SamplingParams(max_tokens=2))
    assert "the context of 8 tokens is full" in why_cut(output, SamplingParams(max_tokens=3))


def test_a_tokenizer_in_place_of_the_checkpoints_own(llm, talker, tmp_path, caplog):
    own = shutil.copytree(talker, tmp_path / "own")
    (talker / "tokenizer.json").unlink()
    (talker / "chat_template.jinja").write_text("<{{ messages[0].content }}>")
    for given in (own, own / "tokenizer.json"):
        other = LLM(talker, tokenizer=given)
        assert other.encode("def f(x):") == llm.encode("def f(x):")
    assert other.tokenizer.chat_template.source == llm.tokenizer.chat_template.source
    assert not caplog.records
    text = json.loads((own / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    one, two = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (talker / "tokenizer.json").write_text(json.dumps(text))
    LLM(shipped_model(), tokenizer=talker)
    assert "2 of the" in caplog.text and "another id" in caplog.text


def test_a_batch_answers_its_lines_in_order(llm, tmp_path, capsys):
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        '{"prompt": "import os", "max_tokens": 9}',
        '"def f("',
        "",
        '{"id": "x", "prompt": [5, 6], "max_tokens": 1}',
    ]
    lines.append('{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}')
    file.write_text("\n".join(lines))
    words = ["run", "--temperature", "0", "--max-tokens", "3"]
    assert main([*words, "--batch", str(file)]) == 0
    printed = capsys.readouterr().out
    answers = [json.loads(line) for line in printed.splitlines()]
    assert [one["id"] for one in answers] == [1, 2, "x", 5]
    chat = llm.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    prompts = [llm.encode("import os"), llm.encode("def f("), [5, 6], chat]
    params = [llm.default_params(temperature=0.0, max_tokens=most) for most in (9, 3, 1, 2)]
    for found, expected in zip(answers, llm.generate(prompts, params), strict=True):
        assert found["text"] == expected.text and found["finish_reason"] == expected.finish_reason
        assert found["prompt_tokens"] == len(expected.prompt_token_ids)
        assert found["completion_tokens"] == len(expected.token_ids)
    assert main([*words, "--prompt-file", str(file), "--output", str(out)]) == 0
    assert "4 answers" in capsys.readouterr().err
    assert out.read_text() == printed and sorted(tmp_path.iterdir()) == [file, out]
    assert_one_error(
        main([*words, "--batch", str(file), "--output", str(out)]), capsys.readouterr(), "there already"
    )


def test_an_interrupted_batch_goes_on(tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"prompt": "a", "max_tokens": 1}\n{"prompt": "b", "max_tokens": 30}\n')
    words = ["run", "--temperature", "0", "--batch", str(file)]
    assert main(words) == 0
    expected, asked, stream = capsys.readouterr().out, [], LLM.stream_all

    def interrupted(self, prompts, *given, **named):
        asked.append(len(prompts))
        for index, piece in stream(self, prompts, *given, **named):
            yield index, piece
            if piece.output is not None and len(asked) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "stream_all", interrupted)
    assert main([*words, "--output", str(out)]) == 130
    assert "1 of 2 answers are kept" in capsys.readouterr().err and not out.exists()
    assert_one_error(
        main([*words, "--output", str(out), "--seed", "5"]), capsys.readouterr(), "other questions"
    )
    assert main([*words, "--output", str(out)]) == 0
    assert asked == [2, 1] and out.read_text() == expected


@pytest.mark.parametrize(
    ("line", "needle"),
    [
        ("hello", "no JSON"),
        ("3", "asks nothing"),
        ('{"promt": "x"}', "one prompt"),
        ('{"prompt": "x", "messages": []}', "one prompt"),
        ('{"messages": []}', "messages cannot be asked"),
        (
            '{"messages": [{"role": "user", "content": null}]}',
            "messages[0], of the role 'user', has no content",
        ),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]}', "messages[1]"),
        ('{"messages": [{"role": "assistant", "content": null, "tool_calls": []}]}', "tool_calls and null"),
        ('{"messages": [{"role": "user", "content": 3}]}', "found 3"),
        ('{"prompt": ["a"]}', "prompt cannot be asked"),
        ('{"prompt": "x", "max_token": 1}', "Nearest: max_tokens"),
        ('{"prompt": "x", "top_p": 2}', "top_p"),
        ('{"prompt": [9999999]}', "outside the vocabulary"),
        ('{"prompt": ""}', "no tokens"),
        ('{"prompt": "x", "id": 1}', "same id"),
    ],
)
def test_a_bad_line_is_named_before_a_tensor_is_read(line, needle, tmp_path, unread, capsys):
    (tmp_path / "in.jsonl").write_text(f'"x"\n{line}\n')
    captured = main(["run", "--batch", str(tmp_path / "in.jsonl")]), capsys.readouterr()
    assert_one_error(*captured, needle)
    assert "in.jsonl, line 2" in captured[1].err


def test_what_calls_tools_may_have_no_content():
    calls = [{"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}]
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "noon", "tool_call_id": "1"},
    ]
    (line,) = read_lines(json.dumps({"messages": messages}), "in.jsonl")
    assert line.question.content == messages


def test_a_share_of_the_memory_is_a_size_of_the_cache(llm):
    with pytest.raises(ConfigError, match="a share such as '30%'"):
        LLM(kv_memory="130%")
    assert LLM(kv_memory="0.01%").plan.kv_cache["tokens"] < llm.plan.kv_cache["tokens"]
