"""Files of requests: each line gets what the server would answer, bad ones an error, and none is answered twice."""

from __future__ import annotations

import asyncio
import io
import json
import os
import threading

import pytest

from pymllm.cli import main
from pymllm.errors import ConfigError
from pymllm.server import batch_file
from pymllm.server.batch_file import BatchFile, count_lines, open_output, read_lines, recover
from pymllm.server.service import Service
from tests.cli.commands import assert_one_error
from tests.processes import SECONDS

PLAIN = {"prompt": "import os\n", "max_tokens": 5, "temperature": 0}


def framed(name, url="/v1/completions", **body):
    return {"custom_id": name, "method": "POST", "url": url, "body": body or PLAIN}


def lines_of(*values):
    return b"".join(
        value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n" for value in values
    )


def answer(llm, text, done=frozenset(), running=4):
    """Run a file of requests.  Returns the answers by id, the counts and the output."""
    target, told = io.BytesIO(), []
    run = BatchFile(Service(llm, "shipped", running, 128), 2 * running, told.append)
    counts = asyncio.run(run.run(io.BytesIO(text), target, set(done)))
    assert len(told) == text.count(b"\n") + (not text.endswith(b"\n"))
    values = [json.loads(line) for line in target.getvalue().splitlines()]
    assert all(line.startswith(batch_file.BEGINNING) for line in target.getvalue().splitlines())
    found = {value["custom_id"]: value for value in values}
    assert len(found) == len(values)
    return found, counts, target.getvalue()


def test_every_endpoint_answers_as_the_server_does(llm):
    chat = {"messages": [{"role": "user", "content": "Hi."}], "max_tokens": 4, "temperature": 0}
    found, counts, _ = answer(
        llm,
        lines_of(
            framed("a"),
            framed("chat", "/v1/chat/completions", **chat),
            {"custom_id": "plain", **PLAIN, "n": 2, "seed": 1},
            b"\n",
            {**chat, "model": "shipped"},
            {**PLAIN, "max_tokens": 0, "echo": True, "logprobs": 1},
        ),
    )
    params = llm.default_params(temperature=0.0, max_tokens=5)
    expected = llm.generate(PLAIN["prompt"], params)[0].text
    assert set(found) == {"a", "chat", "plain", "line-5", "line-6"}
    assert all(value["error"] is None for value in found.values())
    assert all(value["response"]["status_code"] == 200 for value in found.values())
    body = found["a"]["response"]["body"]
    assert body["object"] == "text_completion" and body["choices"][0]["text"] == expected
    assert len(found["plain"]["response"]["body"]["choices"]) == 2
    said = [
        found[name]["response"]["body"]["choices"][0]["message"]["content"] for name in ("chat", "line-5")
    ]
    assert said[0] == said[1]
    assert found["line-6"]["response"]["body"]["choices"][0]["text"] == PLAIN["prompt"]
    assert (counts.answered, counts.failed, counts.skipped) == (5, 0, 0)


def test_responses_and_messages_are_answered_each_in_its_own_words(llm):
    user = [{"role": "user", "content": "Hi."}]
    asked = {"temperature": 0, "model": "shipped"}
    found, counts, _ = answer(
        llm,
        lines_of(
            framed("chat", "/v1/chat/completions", messages=user, max_tokens=4, **asked),
            framed("response", "/v1/responses", input="Hi.", max_output_tokens=4, **asked),
            framed("message", "/v1/messages", messages=user, max_tokens=4, **asked),
            framed("no tokens", "/v1/messages", messages=user, **asked),
            framed("stored", "/v1/responses", input="Hi.", previous_response_id="resp_1"),
        ),
    )
    bodies = {name: value["response"]["body"] for name, value in found.items()}
    said = bodies["chat"]["choices"][0]["message"]["content"]
    assert bodies["response"]["output"][0]["content"][0]["text"] == said
    assert bodies["message"]["content"] == [{"type": "text", "text": said}]
    assert bodies["no tokens"]["type"] == "error"
    assert bodies["no tokens"]["error"]["type"] == "invalid_request_error"
    assert bodies["stored"]["error"]["param"] == "previous_response_id"
    messages = [found[name]["error"]["message"] for name in ("no tokens", "stored")]
    assert "line 4: max_tokens" in messages[0] and "line 5: previous_response_id" in messages[1]
    assert (counts.answered, counts.failed) == (3, 2)


BAD = [
    (b"{bad\n", None, "JSON"),
    (b'"text"\n', None, "object"),
    (b'{"prompt": "\xff"}\n', None, "JSON"),
    (b'{"prompt": NaN}\n', None, "NaN"),
    (b"[" * 100_000 + b"\n", None, "JSON"),
    ({"max_tokens": 4}, None, "prompt"),
    ({"prompt": "x", "input": "x"}, None, "one of"),
    ({"custom_id": 5, "prompt": "x"}, None, "custom_id"),
    (framed("url", "/v1/other"), None, "url"),
    ({**framed("method"), "method": "GET"}, None, "method"),
    ({**framed("body"), "body": "x"}, None, "body"),
    ({**framed("beside"), "temperature": 0}, None, "temperature"),
    (framed("good"), None, "custom_id"),  # an earlier line has it
    (framed("range", prompt="x", temperature=-1), 400, "temperature"),
    (framed("model", prompt="x", model="other"), 404, "other"),
    (framed("streams", prompt="x", stream=True), 400, "stream"),
    (
        framed("tools", "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], tools=[1]),
        400,
        "tools",
    ),
    (framed("long", prompt="x " * 5000), 400, "tokens"),
    (framed("pooling", "/v1/embeddings", input="x"), 400, "pooling"),
]


def test_bad_lines_get_an_error_with_their_number_and_the_others_go_on(llm):
    text = lines_of(framed("good"), *(value for value, _, _ in BAD), framed("last"))
    found, counts, _ = answer(llm, text)
    assert counts.failed == len(BAD) and counts.answered == 2
    assert found["good"]["error"] is None and found["last"]["error"] is None
    by_number = {value["error"]["message"].split(":")[0]: value for value in found.values() if value["error"]}
    for number, (_, status, word) in enumerate(BAD, 2):
        value = by_number[f"line {number}"]
        assert word in value["error"]["message"] and value["error"]["code"]
        assert (None if value["response"] is None else value["response"]["status_code"]) == status


def test_a_line_that_is_too_long_is_one_bad_line(monkeypatch):
    monkeypatch.setattr(batch_file, "MAX_LINE_BYTES", 100)
    text = lines_of({"prompt": "x"}, {"prompt": "y" * 999}, {"prompt": "z"})
    lines = list(read_lines(io.BytesIO(text)))
    assert [line.number for line in lines] == [1, 2, 3]
    assert [line.fault is None for line in lines] == [True, False, True]
    assert [line.fault is None for line in read_lines(io.BytesIO(b'{"prompt": "' + b"y" * 999))] == [False]


def test_a_defect_of_one_line_is_its_own(llm, monkeypatch):
    inner = llm.engine.runner.step

    def step(batch, cache):
        if any(request.params.seed == 13 for request in batch):
            raise ZeroDivisionError("oops")
        return inner(batch, cache)

    monkeypatch.setattr(llm.engine.runner, "step", step)
    found, counts, _ = answer(
        llm, lines_of(*({"custom_id": str(seed), **PLAIN, "seed": seed} for seed in (12, 13, 14)))
    )
    assert found["13"]["response"]["status_code"] == 500 and "oops" not in json.dumps(found["13"])
    assert counts.answered == 2 and counts.failed == 1 and llm.engine.idle


def test_the_engine_stays_full_and_little_of_the_file_is_read_ahead(llm, monkeypatch):
    ahead, sizes, inner = [], [], llm.engine.step
    source = io.BytesIO(
        lines_of(*({**PLAIN, "max_tokens": 2 + n % 5, "ignore_eos": True} for n in range(40)))
    )

    def step():
        batch = inner()
        sizes.append(len(batch))
        ahead.append(source.getvalue()[: source.tell()].count(b"\n"))
        return batch

    monkeypatch.setattr(llm.engine, "step", step)
    run = BatchFile(Service(llm, "shipped", 4, 128), 8, lambda lines: None)
    counts = asyncio.run(run.run(source, io.BytesIO(), set()))
    assert counts.answered == 40
    assert max(sizes) == 4
    assert ahead[0] <= 8


def interrupted(text, cut):
    """Return what is left of an output that was cut off while its last line was written."""
    lines = text.splitlines(keepends=True)
    return b"".join(lines[:-1]) + lines[-1][:cut]


@pytest.mark.parametrize("cut", [1, 10, 40, -20, -1])
def test_an_output_goes_on_where_it_was_interrupted(llm, tmp_path, cut):
    text = lines_of(*(framed(f"request {n}") for n in range(5)), b"{bad\n")
    _, _, whole = answer(llm, text)
    file = tmp_path / "out.jsonl"
    file.write_bytes(interrupted(whole, cut))
    with open_output(file) as target:
        done = recover(target, str(file))
        assert len(done) == (6 if cut == -1 else 5)
        with pytest.raises(ConfigError, match="another process"), open_output(file):
            pass
        run = BatchFile(Service(llm, "shipped", 4, 128), 8, lambda lines: None)
        counts = asyncio.run(run.run(io.BytesIO(text), target, done))
    assert counts.skipped == len(done) and counts.answered + counts.failed == 6 - len(done)
    ids = [json.loads(line)["custom_id"] for line in file.read_bytes().splitlines()]
    assert sorted(ids) == sorted([*(f"request {n}" for n in range(5)), "line-6"])


@pytest.mark.parametrize(
    "content",
    [b"my notes", b"my notes\n", b'{"a": 1}\n', b"\n", b'[1]\n{"id": "batch_req_', b"\xff\xfe", b"[" * 99999],
)
def test_a_file_that_is_no_output_is_left_alone(tmp_path, content):
    file = tmp_path / "notes"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"line 1 is no answer"), open_output(file) as target:
        recover(target, str(file))
    assert file.read_bytes() == content


def test_an_id_that_looks_like_the_number_of_a_bad_line_is_still_answered(llm, tmp_path):
    """Ids that count from 0, and an output that had the bad line's error alone."""
    text = lines_of(
        framed("line-0"), b"no json\n", framed("line-2"), b"[]\n", framed("line-4"), {"prompt": 5}
    )
    _, _, errors = answer(llm, b"\nno json\n\n[]\n")
    target = tmp_path / "out"
    target.write_bytes(errors)
    with open_output(target) as file:
        done = recover(file, str(target))
    found, counts, _ = answer(llm, text, done)
    assert set(found) == {"line-0", "line-2", "line-4", "line-6"}
    assert (counts.answered, counts.failed, counts.skipped) == (3, 1, 2)


@pytest.mark.parametrize("text", [b"", b"a\n", b"a", b"a\n\nb", b"\n" * 3])
def test_lines_are_counted_as_they_are_read(tmp_path, text):
    file = tmp_path / "in"
    file.write_bytes(text)
    assert count_lines(file) == len(text.splitlines()) == len(list(read_lines(io.BytesIO(text))))


def test_the_command_answers_resumes_and_says_what_it_did(tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines_of(framed("a"), PLAIN))
    command = ["batch", str(source), str(target), "--max-running", "2", "--progress", "on"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "2 answered, 0 failed, 0 done before" in captured.err
    assert "batch" in captured.err  # the bar
    first = target.read_bytes()
    source.write_bytes(lines_of(framed("a"), PLAIN, framed("c", prompt="x", model="other")))
    assert main([*command[:-1], "off"]) == 1
    assert "0 answered, 1 failed, 2 done before" in capsys.readouterr().err
    assert target.read_bytes().startswith(first)
    assert json.loads(target.read_bytes().splitlines()[-1])["response"]["status_code"] == 404


def test_a_pipe_is_answered_like_a_file(tmp_path, capsys):
    source, target = tmp_path / "pipe", tmp_path / "out.jsonl"
    os.mkfifo(source)
    writer = threading.Thread(target=source.write_bytes, args=[lines_of(framed("a"), PLAIN)])
    writer.start()
    assert main(["batch", str(source), str(target), "--progress", "on"]) == 0
    writer.join(SECONDS)
    assert "2 answered" in capsys.readouterr().err and len(target.read_bytes().splitlines()) == 2


def test_files_that_cannot_be_are_named(tmp_path, capsys):
    source, missing = tmp_path / "in.jsonl", tmp_path / "missing" / "file"
    source.write_bytes(lines_of(PLAIN))
    for arguments, words in [
        ([str(missing), str(tmp_path / "out")], ["missing", "cannot be read"]),
        ([str(source), str(missing)], ["missing", "cannot be written"]),
        ([str(source), str(source)], ["over the requests"]),
        ([str(tmp_path), str(source)], ["must be files"]),
    ]:
        assert_one_error(main(["batch", *arguments]), capsys.readouterr(), *words)
    assert not (tmp_path / "out").exists() and source.read_bytes() == lines_of(PLAIN)


def test_a_byte_order_mark_is_no_part_of_the_first_request():
    text = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}\n'
    first, second = read_lines(io.BytesIO(b"\xef\xbb\xbf" + text + b"\xef\xbb\xbf" + text))
    assert first.fault is None and first.custom_id == "a" and second.fault is not None
