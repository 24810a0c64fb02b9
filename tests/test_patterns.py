"""Patterns of others: the answers are those of `re` and `fnmatch`, within a bounded number of steps."""

from __future__ import annotations

import fnmatch
import json
import random
import re
import resource
import subprocess
import sys

import pytest

from pymllm.errors import ConfigError, RuleError
from pymllm.patterns import MAX_LENGTH, Pattern, bounded_steps
from pymllm.quantization.rules import Rule
from pymllm.quantization.storage.fields import compile_pattern, compile_wildcards, is_skipped

NAMES = (
    *(f"model.layers.{i}.{name}" for i in (0, 3, 17) for name in ("self_attn.q_proj", "mlp.down_proj")),
    *("lm_head", "model.layers.1.mlp.experts.12.gate_up_proj", "visual.patch_embed.proj", "a\n", "é.ß_K", ""),
)
# As people and programs write them: llm-compressor, GPTQModel, AutoRound, PEFT, ms-swift, transformers.
ORDINARY = (
    *("lm_head", "model", ".*", ".*q_proj", r".*q_proj$", ".*mlp.*", r".*\.(q|k|v)_proj", "", "a|b|"),
    *(r"model\.layers\.\d+\..*", r"model\.layers\.(0|1[0-9])\.self_attn\..*", r".*\.experts\.\d+\.gate_.*"),
    *(
        r"^(model\.layers(?=\.).*\.(k_proj|q_proj))$",
        r"^(?!.*patch_embed).*(?:q_proj|proj).*",
        r"(?i).*Q_PROJ",
    ),
    *(
        r"(?:\w+\.)*down_proj",
        r".*layers\.([1-9]|1\d)\.(?!mlp).*",
        r"(?<=model\.)layers",
        r"\bmlp\b",
        r"\Blm",
    ),
    *(
        r".*(?<!down)_proj\Z",
        r"(?s).+\n",
        r"(\w+)\.layers",
        r"[^\W\d_]+",
        r".{3,9}?\.l",
        r"(?P<a>l)m_(?:head)?",
    ),
    *(
        r"(?x) model \. layers # of it",
        r"(?a:\w+)\.",
        r"(?m:^)a$",
        r"(l)m.*\1",
        r"(model\.)+?(layers\.\d+\.){1,2}mlp",
    ),
)
# Each takes `re` forever on one of the texts, or a while on each of many names.
HOSTILE = (
    *(
        ".?" * 60 + "Z",
        ".*.*.*.*.*.*.*Z",
        "(a+)+$Z",
        "(?:a|a)*Z",
        "(?:a|aa)+b",
        "(?:.*a){12}b",
        "((((a*)*)*)*)*b",
    ),
    *(
        "((((a|b)*)*|c)*|d)*Z",
        "(?:(?:(?:){65535}){65535}){65535}b",
        "(?=(.*a)+Z)",
        "(?!(a|aa)+Z).*Z",
        "(x+x+)+y",
    ),
    *(".{0,60000}" * 80, "(?:(?:(?:.?){60}){60}){60}Z", "(?:[^.]+\\.)*" * 60 + "Z", "(?i)(?:A|a)*(?:a|A)*Z"),
    *("(?:(?:(?:[a-z.]+.?)*[a-z0-9]+)*.?)*Z", "Z?(?:(?:(?:a|aa)*)*)*b", "(?:(?:a{0,60000}){60000}){60000}b"),
)
TEXTS = ("a" * 40, "a" * 3000, "model." * 40, "aaaa.bbbb." * 19)


def refuse(problem: str) -> ConfigError:
    return ConfigError(problem, code="pattern")


def answers(compiled, text: str) -> list[bool]:
    return [getattr(compiled, how)(text) is not None for how in ("match", "fullmatch", "search")]


@pytest.mark.parametrize("pattern", ORDINARY)
def test_ordinary_patterns_answer_as_re_does(pattern):
    compiled, theirs = Pattern(pattern, refuse), re.compile(pattern)
    for name in NAMES:
        assert answers(compiled, name) == answers(theirs, name), name


ATOMS = (
    *(
        "a",
        "b",
        "_",
        r"\.",
        ".",
        "[ab]",
        "[^.]",
        r"\d",
        r"\w",
        r"\W",
        r"\s",
        r"\S",
        "[a-c0-3]",
        r"[^\d.]",
        "1",
        "é",
    ),
    *(
        "^",
        "$",
        r"\b",
        r"\B",
        r"\A",
        r"\Z",
        "(?=a)",
        "(?!b)",
        "(?<=a)",
        r"(?<!\.)",
        "(?<=a.)",
        "(?i:A)",
        "(?s:.)",
    ),
    *("(?i:[A-Bk])", "(?m:^)", "(?m:$)", r"(?a:\w)", "(?!)", "(?:)", r"\n", "K"),
)


def draw(rng: random.Random, depth: int) -> str:
    kind = rng.random()
    if depth <= 0 or kind < 0.4:
        return rng.choice(ATOMS)
    inner = [draw(rng, depth - 1) for _ in range(rng.randint(2, 3))]
    if kind < 0.6:
        return "".join(inner)
    if kind < 0.7:
        return f"(?:{'|'.join(inner)})"
    if kind < 0.8:
        return rng.choice(("(?=", "(?!", "(", "(?:")) + inner[0] + ")"
    return f"(?:{inner[0]})" + rng.choice(("*", "+", "?", "{2}", "{1,3}", "{0,2}", "{2,}", "*?", "+?", "??"))


def test_random_patterns_answer_as_re_does():
    rng = random.Random(0)
    for _ in range(700):
        pattern = rng.choice(("", "", "(?i)", "(?s)", "(?m)", "(?a)")) + draw(rng, 4)
        compiled, theirs = Pattern(pattern, refuse), re.compile(pattern)
        # Every program as sets of positions, too: `re` answers for the simplest.
        sets = Pattern(pattern, refuse)
        sets._simple = lambda text, few_choices: None
        for _ in range(4):
            text = "".join(rng.choice("aabb._.01Kk\n é") for _ in range(rng.randint(0, 9)))
            assert answers(compiled, text) == answers(sets, text) == answers(theirs, text), (pattern, text)


def test_random_wildcards_answer_as_fnmatch_does():
    rng = random.Random(0)
    for _ in range(1000):
        pattern = "".join(rng.choice("**??[]!-abz.\\^&|") for _ in range(rng.randint(0, 9)))
        text = "".join(rng.choice("ab.z-]![\n^") for _ in range(rng.randint(0, 6)))
        found = compile_wildcards(pattern, "exclude").fullmatch(text) is not None
        assert found == fnmatch.fnmatchcase(text, pattern), (pattern, text)


def test_hostile_patterns_end():
    code = (
        "import json, sys\n"
        "from pymllm.patterns import Pattern\n"
        "patterns, texts = json.load(sys.stdin)\n"
        "for pattern in patterns:\n"
        "    for text in texts:\n"
        "        try:\n"
        "            compiled = Pattern(pattern, RuntimeError)\n"
        "            print([how(text) for how in (compiled.match, compiled.fullmatch, compiled.search)])\n"
        "        except RuntimeError as error:\n"
        "            print(error)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([HOSTILE, TEXTS]),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (60, 60)),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == len(HOSTILE) * len(TEXTS)
    assert {line for line in lines if "[" not in line} <= {"one that takes too many steps to match"}


@pytest.mark.parametrize(
    ("pattern", "problem"),
    (
        ("x" * (MAX_LENGTH + 1), "longer than"),
        ("(" * 300 + ")" * 300, "groups deep"),
        ("(", "no regular expression"),
        ("*", "no regular expression"),
        ("(?<=a*)b", "no regular expression"),
        ("a{99999999999}", "no regular expression"),
        ("[z-a]", "no regular expression"),
        (r"(.*)(.*)\1\2Z", "a reference to a group"),
        (r"(a)?(?(1)b|c)*", "a condition"),
        ("(?i)[\\0-\uffff]", "ignores case"),
    ),
)
def test_what_cannot_be_matched_is_refused_and_says_why(pattern, problem):
    with pytest.raises(ConfigError, match=problem):
        Pattern(pattern, refuse)
    with pytest.raises(ConfigError, match=problem) as caught:
        compile_pattern(pattern, "ignore", "re:")
    assert caught.value.code == "quantization-config" and len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ("a" * 5000, "a" * 10**6))
def test_a_name_that_no_layer_can_have_is_refused(text):
    with pytest.raises(ConfigError, match="characters"):
        Pattern(".*a.*Z", refuse).match(text)


def test_one_pattern_takes_a_bounded_number_of_steps_over_all_names():
    inner = "(?:(?:..|(?:[ab](?:(?:aabaab[ab]){1,200}(?:(?:(?:[ab]|..)(?:[ab]|aab))?)+(?:.(?:b(?:b|.).)+)?)?)*))*c?"
    pattern = Pattern(inner, refuse)
    rng = random.Random(0)
    with pytest.raises(ConfigError, match="too many steps"):
        for _ in range(1000):
            pattern.fullmatch("".join(rng.choice("ab") for _ in range(190)))
    with pytest.raises(ConfigError, match="too many steps"):
        pattern.fullmatch("ab" * 95)
    assert Pattern(inner, refuse).fullmatch("ab" * 95)  # alone it is taken


def test_all_patterns_of_a_checkpoint_take_a_bounded_number_of_steps_together():
    patterns = [Pattern(f".*{number}.*b|c.*d", refuse) for number in range(100)]
    with pytest.raises(ConfigError, match="so many names"), bounded_steps(50_000):
        for name in range(100):
            with bounded_steps():  # shares what is left
                [pattern.match(f"a{name}") for pattern in patterns]
    assert name > 5
    patterns[0].match("a0")  # outside, each for itself


@pytest.mark.parametrize(
    "pattern", ("re:" + ".?" * 60 + "Z", "re:(a+)+b", "**." * 60 + "Z", "*a" * 40 + "Z", "?" * 100)
)
def test_rules_match_without_going_back(pattern):
    rule = Rule.parse(f"{pattern}=fp8")
    assert not any(rule.matches(text[:190]) for text in TEXTS)


def test_a_rule_that_cannot_be_matched_is_an_error():
    for pattern in ("re:(", "re:" + "(" * 100 + ")" * 100, "re:" + "x" * 1001, "?" * 1001):
        with pytest.raises(RuleError) as caught:
            Rule.parse(f"{pattern}=fp8")
        assert caught.value.code == "rule-syntax"


def test_skipped_names_end_at_a_segment_or_at_the_end():
    # transformers' own three ways: the start up to a dot, the start, the end.
    assert is_skipped(["model.layers.1.mlp"], [r"model\.layers\.1"])
    assert is_skipped(["model.layers.10.mlp"], ["mlp"]) and is_skipped(["lm_head"], ["lm_head"])
    assert not is_skipped(["model.layers.10.mlp"], [r"model\.layers\.1"])
    assert not is_skipped([text[:190] for text in TEXTS], [".?" * 60 + "Z"])
