"""What users write: quantisation rules, files of them, options of the command line, and lines of batch files."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

import pymllm
from pymllm.cli import main
from pymllm.errors import RequestError, RuleError
from pymllm.server.batch_file import BatchFile, read_lines

from ..checkpoints import write_checkpoint
from .bodies import GOOD, Bodies, check
from .inputs import Input, changed_bytes, changed_json, chosen

RULES, ARGUMENTS, LINES = "rules.txt", "arguments.json", "lines.jsonl"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}

GOOD_RULES = (
    *("**.mlp.**=fp8", "model.layers.0.**=none", "lm_head=fp8:granularity=block", "**=int4:group_size=32"),
    *(
        "re:.*(up|down)_proj=int8",
        "*.*.0.self_attn.q_proj=int4:group_size=16,symmetric=true",
        "**=gguf:type=Q8_0",
    ),
)
PIECES = (
    *(
        "=",
        ":",
        ",",
        "*",
        "**",
        "?",
        ".",
        "re:",
        "(",
        "(a+)+$",
        ".?" * 60,
        "\x00",
        "\x1b[31m",
        "\u202e",
        "é",
        " ",
        "\n",
    ),
    *(
        "none",
        "int4",
        "fp8",
        "gguf",
        "group_size",
        "=0",
        "=-1",
        "=1e9",
        "=99999999999999999999",
        "bits=3",
        "#",
        "@x",
    ),
    *(
        "@/dev/zero",
        "@/",
        "model",
        "lm_head",
        "true",
        "9" * 5000,
        "a" * 5000,
        "[",
        "]",
        "{0}",
        "%s",
        "\\",
        "\ufeff",
    ),
)
OPTIONS = (
    *(
        "--quant",
        "--quant-file",
        "--device",
        "--dtype",
        "--compute",
        "--kernel",
        "--kv-cache",
        "--revision",
        "--all",
    ),
    *(
        "--definition",
        "--strategy",
        "--tensor-parallel-size",
        "--max-model-len",
        "--kv-memory",
        "--json",
        "--diff",
    ),
    *("--expert-parallel", "--no-memory-check", "--verbose", "--rank", "--nothing", "--", "-", ""),
)
VALUES = (
    *(
        "cpu",
        "cuda",
        "cuda:sm90",
        "cpu:x",
        "float32",
        "auto",
        "exact",
        "linear=reference",
        "x=y",
        "fp8",
        "**=fp8",
    ),
    *(
        "0",
        "1",
        "2",
        "3",
        "-1",
        "1e9",
        "٣",
        "9" * 40,
        "2GB",
        "-2GB",
        "1e400GB",
        "512MiB",
        "0x10",
        "nanGB",
        "block_diffusion",
    ),
    *(
        "block_diffusion:block_length=0",
        "x:",
        "greedy:a=b",
        "",
        " ",
        "\x00",
        "\x1b[31m",
        "\ud800",
        "../..",
        "/dev/zero",
    ),
    *("**=int4:group_size=32", "re:(=fp8", "re:(a+)+$=int8", "@x"),
)


def changed_text(rng: random.Random, text: str, pieces: tuple[str, ...] = PIECES) -> str:
    """Put pieces into a text, and leave some of it out."""
    for _ in range(rng.randrange(1, 4)):
        at, cut = rng.randrange(len(text) + 1), rng.choice((0, 0, 1, 4))
        text = text[:at] + rng.choice((*pieces, "")) + text[at + cut :]
    return text


class Rules:
    """Planning by rules, calling verbs, and answering files of requests."""

    name = "rules"

    def __init__(self) -> None:
        self.bodies = Bodies()

    def prepare(self, folder: Path) -> None:
        self.folder = folder / "model"
        write_checkpoint(self.folder, **SIZES)
        # Here, once for all children: what a plan imports.
        pymllm.plan(self.folder, device="cpu", quant="**=int4:group_size=32")

    def inputs(self) -> SearchStrategy[Input]:
        return chosen((5, self._rules), (3, self._arguments), (3, self._lines))

    def _rules(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            rng = draw(st.randoms(use_true_random=False))
            lines = rng.sample(GOOD_RULES, rng.randrange(1, 4))
            lines[-1] = changed_text(rng, lines[-1])
            way = draw(st.sampled_from(("rule", "rule", "file", "kv")))
            text = lines[-1] if way != "file" else "\n".join(lines)
            return Input(way, {RULES: text.encode("utf-8", "surrogatepass")}, text[:60], "means")

        return make()

    def _arguments(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            rng = draw(st.randoms(use_true_random=False))
            arguments = []
            for _ in range(rng.randrange(1, 4)):
                arguments += [rng.choice(OPTIONS)] + [rng.choice(VALUES)] * rng.choice((0, 1, 1, 1))
            return Input(
                "plan", {ARGUMENTS: json.dumps(arguments).encode()}, " ".join(arguments)[:60], "means"
            )

        return make()

    def _lines(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            lines = []
            for subject in draw(st.lists(st.sampled_from(sorted(GOOD)), min_size=1, max_size=3)):
                path, body = GOOD[subject]
                framed = {"custom_id": subject, "method": "POST", "url": path, "body": body}
                line = framed if draw(st.booleans()) else {"custom_id": subject, **body}
                lines.append(draw(changed_json(line))[0].replace(b"\n", b" "))
            data = b"\n".join(lines)
            if draw(st.sampled_from((True, False, False, False))):
                data = draw(changed_bytes(data))[0]
            return Input("batch", {LINES: data}, f"{len(lines)} lines", "means")

        return make()

    def judge(self, given: Input, folder: Path) -> bool:
        if ARGUMENTS in given.files:
            return self._call(json.loads(given.files[ARGUMENTS]), folder)
        if LINES in given.files:
            return self._answer(given.files[LINES])
        file = given.write(folder) / RULES
        if given.subject == "file":
            pymllm.plan(self.folder, device="cpu", quant=file)
            return False
        text = given.files[RULES].decode("utf-8", "surrogatepass")
        options = {"quant": text} if given.subject == "rule" else {"kv_cache": text}
        str(pymllm.plan(self.folder, device="cpu", **options))
        return False

    def _call(self, arguments: list[str], folder: Path) -> bool:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(folder):
            code = main(["plan", str(self.folder), *arguments])
        told = err.getvalue()
        check(code in (0, 1, 2), f"exit code {code}")
        check("Traceback" not in told, f"a traceback: {told[-300:]}")
        shown = out.getvalue() + told
        check(
            all(letter.isprintable() or letter in "\n" for letter in shown), f"it shows {ascii(shown)[:200]}"
        )
        if code:
            check(bool(told.strip()), "it fails without a word")
            raise RuleError("refused", code=f"exit {code}")
        return False

    def _answer(self, data: bytes) -> bool:
        self.bodies._start()
        service, target = self.bodies.app.state.service, io.BytesIO()
        wanted = sum(line is not None for line in read_lines(io.BytesIO(data)))
        work = BatchFile(service, 4, lambda count: None).run(io.BytesIO(data), target, set())
        counts = self.bodies.loop.run_until_complete(asyncio.wait_for(work, 60))
        self.bodies._check_after()
        answers = [json.loads(line) for line in target.getvalue().splitlines()]
        check(
            len(answers) == wanted == counts.answered + counts.failed,
            f"{len(answers)} answers to {wanted} lines",
        )
        for answer in answers:
            response = answer["response"]
            check(response is None or response["status_code"] < 500, f"{response}"[:300])
            check(
                (response is None or response["status_code"] != 200) == (answer["error"] is not None),
                f"{answer}"[:300],
            )
        if counts.failed:
            raise RequestError("refused", code="batch line")
        return False
