"""SECURITY.md and docs/faults.md against the code: what they promise, and the tests that they name."""

from __future__ import annotations

import ast
import hmac
import re
from pathlib import Path

import pytest

from pymllm.engine import sampling
from pymllm.engine.scheduler import MAX_REQUESTS
from pymllm.server import app, connections, gate
from pymllm.server.limits import Limits
from pymllm.server.protocol import base, completions, embeddings, tokens
from pymllm.text import chat_template, grammars, text_bounds, tokenizer_files

ROOT = Path(__file__).parents[1]
SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
FAULTS = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
LIMITS = Limits()


def rows_of(page: str) -> list[list[str]]:
    """The rows of a page's tables, cell by cell, without heads."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    heads = {number - 1 for number, line in enumerate(lines) if line.startswith("| --- ")}
    return [row for number, row in enumerate(cells) if number not in heads and row[0] != "---"]


# --- docs/faults.md


def test_every_fault_has_tests_and_every_test_is_there():
    rows = rows_of(FAULTS)
    assert [row[0] for row in rows] == [str(number) for number in range(1, 63)]
    known: dict[str, set[str]] = {}
    for number, what, answer, tests in rows:
        assert what and answer and tests, number
        for node in tests.split("<br>"):
            file, function = re.fullmatch(r"`(tests/[\w/]+\.py)::(\w+)(?:\[[\w-]+\])?`", node).groups()
            if file not in known:
                tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
                known[file] = {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}
            assert function in known[file], (number, node)


def test_the_check_of_faults_runs_them_with_and_without_asserts():
    _, _, recipe = MAKEFILE.partition("\nfaults-check:")
    recipe = recipe.partition("\n\n")[0]
    pattern = re.search(r"grep -oE '([^']*)' docs/faults\.md", recipe)[1].replace("[^]`]", r"[^\]`]")
    named = {node.strip("`") for row in rows_of(FAULTS) for node in row[3].split("<br>")}
    assert len(named) > 100
    assert {found[0] for found in re.finditer(pattern, FAULTS)} == named
    assert recipe.count("-m pytest") == 2 and recipe.count("PYTHONOPTIMIZE=1") == 1


# --- SECURITY.md

MIB = 1 << 20
CODE = {
    "a body": f"{LIMITS.body_bytes // MIB} MiB",
    "all bodies that arrive together": f"{LIMITS.arriving_bytes // MIB} MiB",
    "the headers of a request": f"{LIMITS.header_bytes >> 10} KiB",
    "seconds for the headers": LIMITS.header_seconds,
    "seconds for the body": LIMITS.body_seconds,
    "seconds of an idle connection": LIMITS.idle_seconds,
    "seconds in which a client must take something": LIMITS.write_seconds,
    "tokens that a client may be behind its stream": LIMITS.pieces,
    "connections": LIMITS.connections,
    "prompts that are answered together": MAX_REQUESTS,
    "prompts that wait": app.MAX_WAITING,
    "requests on their way in": LIMITS.reading,
    "chunks of a body": connections.MOST_CHUNKS,
    "parameters of a body": base.MAX_PARAMETERS,
    "keys of an object in a body": base.MAX_KEYS,
    "keys of all objects": base.MAX_ALL_KEYS,
    "values of a body": base.MAX_VALUES,
    "objects and lists of a body": base.MAX_OF_BODY,
    "objects and lists of a parameter": base.MAX_OBJECTS,
    "levels of a parameter": base.MAX_DEPTH,
    "prompts of a completion": completions.MAX_PROMPTS,
    "texts to embed": embeddings.MAX_INPUTS,
    "characters of a text to embed, to tokenize, or to cut": embeddings.MAX_CHARACTERS,
    "answers (`n`)": sampling.MAX_ANSWERS,
    "`logprobs`, `top_logprobs`": sampling.MAX_LOGPROBS,
    "stop strings": sampling.MAX_STOP_STRINGS,
    "characters of a stop string": sampling.MAX_STOP_LENGTH,
    "stop tokens": sampling.MAX_STOP_TOKENS,
    "biased tokens": sampling.MAX_LOGIT_BIASES,
    "bad words": sampling.MAX_BAD_WORDS,
    "characters of a grammar or a schema": grammars.MAX_GRAMMAR_LENGTH,
    "compiled grammars that are kept": grammars.KEPT_GRAMMARS,
    "processor seconds of a template": chat_template.MAX_SECONDS,
    "MiB of a template's process": chat_template.MAX_MEMORY // MIB,
    "characters that a template adds": chat_template.MAX_CHARACTERS,
    "processor seconds to try a tokenizer.json": tokenizer_files.MAX_SECONDS,
    "MiB to try a tokenizer.json": tokenizer_files.MAX_MEMORY // MIB,
}


def test_the_table_of_limits_is_the_codes():
    table = [row for row in rows_of(SECURITY.partition("\n## Limits\n")[2])]
    assert [row[0] for row in table] == list(CODE)
    for words, value, *_ in table:
        expected = CODE[words]
        assert value == (f"{expected:g}" if isinstance(expected, float) else str(expected)), words
    assert tokens.MAX_CHARACTERS == embeddings.MAX_CHARACTERS
    assert f"at {text_bounds.CHARACTERS_A_TOKEN} characters for each token" in SECURITY


UNSAFE = re.compile(
    r"^\s*(?:import|from)\s+(?:pickle|marshal|shelve|dill|cloudpickle)\b"
    r"|(?<![.\w])(?:eval|exec)\(|os\.system\(|torch\.hub\.load\(|torch\.load\((?!\w+, weights_only=True)"
    r"|shell=(?!False)|trust_remote_code=(?!False)|(?:gather|broadcast|send|recv|scatter)_object",
    re.MULTILINE,
)


def test_nothing_is_unpickled_evaluated_or_run_by_a_shell():
    files = [
        file for file in (ROOT / "pymllm").rglob("*.py") if UNSAFE.search(file.read_text(encoding="utf-8"))
    ]
    assert files == []
    for code in (
        "import pickle",
        "  x = eval(y)",
        "torch.load(f)",
        "run(a, shell=True)",
        "dist.all_gather_object(a, b)",
    ):
        assert UNSAFE.search(code)


@pytest.mark.parametrize(
    "key", [b"", b"Bearer", b"Bearer wrong", b"Bearer secret ", b"Bearer secret" + b"x" * 999]
)
def test_keys_are_compared_in_constant_time(monkeypatch, key):
    """What is compared is as long for every key."""
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda *given: compared.append(given) or False)
    guard = gate.Guard(lambda *given: None, "secret", 1 << 14, ())
    scope = {"type": "http", "path": "/v1/models", "headers": [(b"authorization", key)]}
    assert guard._refusal(scope).status_code == 401
    assert [len(digest) for pair in compared for digest in pair] == [32, 32]
