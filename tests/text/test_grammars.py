"""Answers that follow a grammar, whatever the model would rather say, and grammars that cannot be followed."""

from __future__ import annotations

import contextlib
import json
import re
import signal

import pytest
import tokenizers

from pymllm import LLM, SamplingParams
from pymllm.api import shipped_model
from pymllm.engine.session import Session
from pymllm.errors import ConfigError, RequestError
from pymllm.text import grammars
from pymllm.text.grammars import Grammar, GrammarCompiler
from pymllm.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "sizes": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}
PROMPT = "def read_lines(path):\n"


@pytest.fixture(scope="module")
def llm():
    return LLM(shipped_model())


def answer(llm, prompt=PROMPT, **settings):
    return llm.generate(prompt, SamplingParams(max_tokens=150, **settings))[0]


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.5, "seed": 3}, {"repetition_penalty": 1.3}], ids=str
)
@pytest.mark.parametrize(
    "pattern", [r"[0-9]{3}-[a-z]{4}", r"(yes|no), said the (cat|dog)\.", r"[α-ω]{2,5}", r"\x00?a{1,3}"]
)
def test_an_answer_matches_the_whole_expression(llm, pattern, settings):
    found = answer(llm, regex=pattern, **settings)
    assert re.fullmatch(pattern, found.text)
    assert found.finish_reason == "stop"


def test_an_answer_is_what_the_schema_says(llm):
    for seed in range(4):
        found = answer(llm, json_schema=SCHEMA, temperature=1.2, seed=seed, logit_bias={})
        if found.finish_reason == "stop":
            value = json.loads(found.text)
            assert set(value) == {"name", "sizes"} and len(value["name"]) <= 6
        else:  # every beginning is one of such a text
            assert found.text.startswith("{")
    fixed = {"type": "object", "properties": {"a": {"const": [1, "x", None]}}, "required": ["a"]}
    assert json.loads(answer(llm, json_schema={**fixed, "additionalProperties": False}).text) == {
        "a": [1, "x", None]
    }
    assert answer(llm, json_schema={"const": True}).text.strip() == "true"


def test_a_grammar_in_larks_notation(llm):
    text = 'start: NUMBER (("+" | "*") NUMBER){2}\nNUMBER: /[1-9][0-9]?/'
    for seed in range(4):
        assert re.fullmatch(
            r"\d\d?([+*]\d\d?){2}", answer(llm, grammar=text, temperature=1.0, seed=seed).text
        )


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0, "seed": 1}], ids=str)
@pytest.mark.parametrize("text", ["<|im_end|>", "a<|endoftext|>b", "<|im_start|>"])
def test_text_that_spells_a_special_token_is_text(llm, text, settings):
    assert answer(llm, regex=re.escape(text), **settings).text == text
    assert json.loads(answer(llm, json_schema={"const": text}, **settings).text) == text
    assert answer(llm, grammar=f'start: "{text}" "!"', **settings).text == text + "!"


@pytest.mark.parametrize("pattern", [" yes", "  no", " {0,2}(yes|no)", "é\n ?漢", "</s> ?a"])
def test_an_answer_is_exact_where_decoders_leave_out_a_first_space(llm, pattern, tmp_path):
    """A tokenizer in the way of Llama 2's, with fewer tokens than the model, or more."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "▁yes"]
    model = tokenizers.models.BPE(
        {token: index for index, token in enumerate([*vocabulary, *"yesnoa</>"])},
        [],
        byte_fallback=True,
        unk_token="<unk>",
    )
    spelled = tokenizers.Tokenizer(model)
    prepend, replace = tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")
    spelled.normalizer = tokenizers.normalizers.Sequence([prepend, replace])
    d = tokenizers.decoders
    spelled.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    spelled.add_special_tokens(["<unk>", "<s>", "</s>"])
    spelled.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    size = spelled.get_vocab_size()
    for vocabulary_of_model in (llm.config.size("vocab_size"), size, size - 1):
        session = Session(llm.engine, tokenizer, GrammarCompiler(tokenizer, vocabulary_of_model, [2]))
        compiled = session.grammars.start(Grammar("regex", pattern)).allowed()
        assert len(compiled) == vocabulary_of_model
        if vocabulary_of_model != llm.config.size("vocab_size"):
            continue
        for seed in range(4):
            session.add([5, 6], SamplingParams(regex=pattern, temperature=3.0, seed=seed))
        texts = []
        while session.unfinished:
            texts += [p.output.text for _, p in session.step() if p is not None and p.output is not None]
        assert len(texts) == 4 and all(re.fullmatch(pattern, text) for text in texts)


def test_a_large_expression_holds_no_step_up(llm):
    """Its work is counted in llguidance's own fuel: with its default limits one token takes ten seconds."""
    assert answer(llm, regex="((((a{1000}){1000}){1000}){1000}){1000}").finish_reason == "length"


def test_what_leaves_no_token_beside_a_grammar_is_the_request_s_own_error(llm):
    with pytest.raises(RequestError, match="ruled out by bad_words"):
        answer(llm, regex="a", bad_words=("a",))
    assert llm.engine.idle


def test_requests_side_by_side_follow_their_own(llm):
    each = [
        SamplingParams(max_tokens=20, regex="[0-9]{5}"),
        SamplingParams(max_tokens=20),
        SamplingParams(max_tokens=20, json_schema={"enum": ["red", "green"]}),
        SamplingParams(max_tokens=20, regex="[a-f]{4}", n=2, temperature=1.0, seed=1, logprobs=2),
    ]
    together = llm.generate([PROMPT] * 4, each)
    assert [output.text for output in together[1:2]] == [answer(llm).text[: len(together[1].text)]]
    assert re.fullmatch("[0-9]{5}", together[0].text) and together[2].text in ('"red"', '"green"')
    assert all(re.fullmatch("[a-f]{4}", output.text) for output in together[3].outputs)
    # Log-probabilities are the model's own: the likeliest tokens may well be ruled out.
    assert all(len(entry.top) == 2 for entry in together[3].logprobs)


def test_streams_preemption_and_seeds(llm):
    settings = {"regex": r"(ab|cd){3,9}\.", "temperature": 1.0, "seed": 8, "max_tokens": 40}
    whole = llm.generate([PROMPT], SamplingParams(**settings))[0]
    streamed = "".join(piece.text for piece in llm.stream(PROMPT, SamplingParams(**settings)))
    assert streamed == whole.text and re.fullmatch(settings["regex"], whole.text)


@pytest.mark.parametrize(
    ("settings", "parameter"),
    [
        ({"regex": "("}, "regex"),
        ({"regex": "x" * (grammars.MAX_GRAMMAR_LENGTH + 1)}, "regex"),
        ({"regex": 5}, "regex"),
        ({"grammar": "start: missing"}, "grammar"),
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": []}, "json_schema"),
        ({"json_schema": {"type": "bogus"}}, "json_schema"),
        ({"json_schema": {"$ref": "http://elsewhere/schema"}}, "json_schema"),
        ({"regex": "a", "grammar": 'start: "a"'}, "grammar"),
        # What takes minutes to compile, or for one token.
        ({"regex": "(" + "a*" * 20_000 + ")b"}, "regex"),
        ({"json_schema": {"type": "string", "pattern": "a?" * 5000}}, "json_schema"),
        ({"grammar": "start: /" + "a{0,9}" * 5000 + "/"}, "grammar"),
        # What overflows the stack of its thread.
        (
            {"grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000)) + 'r4000: "a"'},
            "grammar",
        ),
        # What no text follows.
        ({"json_schema": {"$ref": "#"}}, "json_schema"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_a_step(llm, settings, parameter):
    with pytest.raises(RequestError) as caught:
        answer(llm, **settings)
    assert caught.value.tensor == parameter
    assert llm.engine.idle


def test_a_grammar_is_compiled_once_and_few_are_kept(llm, monkeypatch):
    compiled = []
    compile_one = llm.grammars._compile
    monkeypatch.setattr(
        llm.grammars, "_compile", lambda *args: compiled.append(args[0]) or compile_one(*args)
    )
    monkeypatch.setattr(grammars, "KEPT_GRAMMARS", 2)
    for text in ("q{2}", "q{2}", "r{2}", "s{2}", "r{2}", "q{2}"):
        llm.grammars.start(Grammar("regex", text))
    assert [grammar.text for grammar in compiled] == ["q{2}", "r{2}", "s{2}", "q{2}"]


def test_without_the_package_the_error_names_the_extra(llm, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ConfigError, match="pip install"):
        llm.grammars.start(Grammar("regex", "never seen before"))


@pytest.mark.parametrize("line", ['"' + '\\"' * 32_000, "/" + "\\/" * 32_000, '/a"' * 20_000, '"/' * 30_000])
def test_a_grammar_whose_strings_do_not_end_is_read_in_one_go(line):
    def too_long(*_):
        raise AssertionError("20 s of this process's own time")

    before = signal.signal(signal.SIGVTALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, 20)
    try:
        grammars.Grammar("lark", line)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ('"&&&&&&&&&&&&"', True),
        ("/&&&&&&&&&&&&/", True),
        ("a & b" * 11, False),
        ('"a" & ' * 11 + '"', False),
        ('// "&&&&&&&&&&&&" unclosed', True),
        ('"\\"&&&&&&&&&&&&', False),
    ],
)
def test_expressions_that_hold_together_are_counted_outside_of_strings(text, fits):
    with contextlib.nullcontext() if fits else pytest.raises(RequestError, match="hold for the same text"):
        grammars.Grammar("lark", text)


@pytest.mark.parametrize(
    "schema", ['{"const": -9223372036854775808}', '{"enum": ["a", -9223372036854775807]}']
)
def test_a_schema_that_crashes_its_compiler_crashes_a_process_of_its_own(llm, schema):
    # The least number of 64 bits has no absolute value, by which llguidance overflows its stack.
    with pytest.raises(RequestError, match="cannot be compiled: it crashed"):
        answer(llm, json_schema=schema)
    assert answer(llm, json_schema={"const": -7}).text == "-7"
