# ruff: noqa: E501 -- templates stand on one line

"""Chat templates beside transformers' own rendering, and templates that do harm."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from pymllm.errors import CheckpointError, ConfigError, PymllmError, RequestError
from pymllm.text import chat_template as rendering
from pymllm.text.chat_template import RENDERER, ChatTemplate, chat_template_of
from pymllm.text.template_files import choose_template, read_templates
from pymllm.text.tokenizer import Tokenizer

HI = [{"role": "user", "content": "hi"}]
TALK = [
    {"role": "system", "content": "Be brief. <b>é</b> 中"},
    {"role": "user", "content": " one\n"},
    {"role": "assistant", "content": "two", "reasoning_content": "because"},
    {"role": "user", "content": "three 😀"},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "ü <x>", "parameters": {"type": "object", "properties": {}}},
    }
]
LOOP = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"

CONSTRUCTS = {
    "plain": LOOP,
    "blocks are trimmed": "  {% for m in messages %}\n  {%- if m.role == 'user' %}\n    {{ m.content }}\n  {% endif %}\n{% endfor %}\n\n",
    "generation": "{% for m in messages %}{% generation %}{% set z = 1 %}{{ m.content }}{% endgeneration %}{{ z }}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "tojson": "{{ tools | tojson }}{{ messages | tojson }}",
    "tojson indent": "{{ tools | tojson(indent=4) }}",
    "tojson arguments": "{{ tools | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}",
    "tojson positional": "{{ tools | tojson(True, 2) }}",
    "documents": "{% if documents is defined %}{{ documents }}{% endif %}{% for d in documents or [] %}{{ d.title }}{% endfor %}",
    "tools are none": "{{ tools is none }} {{ tools is defined }} {{ nothing is defined }}",
    "variables": "{{ enable_thinking is defined and enable_thinking is false }} {{ bos_token }}{{ eos_token }}",
    "prompt": "{% if add_generation_prompt %}assistant:{% endif %}",
    "namespace": "{% set ns = namespace(a=0, self=2) %}{% for m in messages %}{% set ns.a = ns.a + m.content|length %}{% endfor %}{{ ns.a }}{{ ns.self }}",
    "dict": "{{ dict(a=1, b=[2]) }}{{ dict.fromkeys(['x'], 1) }}",
    "reasoning by other names": "{% for m in messages %}{{ m.thinking }}|{{ m.reasoning_content }}|{{ m.reasoning }};{% endfor %}",
    "macros": "{% macro show(c, n=1) %}{{ c | trim }}{{ n }}{% endmacro %}{% for m in messages %}{{ show(m.content, n=loop.index) }}{% endfor %}",
    "string methods": "{{ messages[0].content.split('.')[0].upper() }}{{ messages[-1]['content'][::-1] }}{{ 'x'.join(['a','b']) }}{{ messages[1].content.strip() }}",
    "tests": "{{ messages is sequence }}{{ messages[0] is mapping }}{{ messages[0].content is string }}{{ 3 is even }}",
    "filters": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') }}{{ messages | length }}{{ [3,1]|sort }}{{ '<'|e }}{{ messages[2]|items|list }}",
    "call and filter blocks": "{% filter upper %}a{{ messages[0].role }}{% endfilter %}{% set x %}y{{ 1 + 1 }}{% endset %}{{ x }}",
    "slices and numbers": "{{ messages[1:]|length }} {{ 7 // 2 }} {{ 2 ** 10 }} {{ 1 / 3 }} {{ 10**64**2 }} {{ 'ab' * 3 }} {{ 1.0 }} {{ 1e20 }}",
    "undefined": "[{{ nothing }}][{{ messages[0].nothing }}]{{ messages[0]['nothing'] is defined }}",
    "inline if": "{{ 'a' if messages|length > 2 else 'b' }}{{ '' if false }}{{ none }}{{ true }}",
    "raw and comments": "{% raw %}{{ x }}{% endraw %}{# no #}{{ '{{' }}",
    "call with caller": "{% macro w() %}<{{ caller() }}>{% endmacro %}{% call w() %}{{ messages[0].role }}{% endcall %}",
    "recursion": "{% for x in [1,[2,[3]]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}",
    "year": "{{ strftime_now('%Y') | length }}",
}


def by_transformers(source, messages, tools=None, prompt=True, final=False, **variables):
    kept = [{key: value for key, value in message.items() if value is not None} for message in messages]
    # Before 5.21 transformers left the names of reasoning alone.
    kept = [{"thinking": m["reasoning_content"], **m} if "reasoning_content" in m else m for m in kept]
    return render_jinja_template(
        [kept],
        tools=tools,
        chat_template=source,
        add_generation_prompt=prompt,
        continue_final_message=final,
        **variables,
    )[0][0]


@pytest.mark.parametrize("source", CONSTRUCTS.values(), ids=CONSTRUCTS.keys())
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
def test_the_text_is_that_of_transformers(source, tools):
    special, variables = {"bos_token": "<s>", "eos_token": "</s>"}, {"enable_thinking": False}
    if "documents" in source and tools:
        variables["documents"] = [{"title": "T", "text": "t"}]
    expected = by_transformers(source, TALK, tools, **special, **variables)
    found = ChatTemplate(source, "x").render(TALK, special, tools=tools, variables=variables)
    assert found == expected


def test_what_is_null_in_a_message_is_not_there():
    messages = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}, *HI]
    source = (
        "{% for m in messages %}{{ 'content' in m }}{{ m.content }}{{ m.tool_calls is defined }}{% endfor %}"
    )
    assert ChatTemplate(source, "x").render(messages, {}) == by_transformers(source, messages)


FINALS = {
    "as it is": "{% for m in messages %}<{{ m.role }}>{{ m.content }}</m>{% endfor %}",
    "stripped": "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</m>\n{% endfor %}",
}


@pytest.mark.parametrize("source", FINALS.values(), ids=FINALS.keys())
@pytest.mark.parametrize("content", ["go", "go on  ", "", " \n"])
def test_a_final_message_stays_open_as_in_transformers(source, content):
    messages = [*HI, {"role": "assistant", "content": content}]
    found = ChatTemplate(source, "x").render(
        messages, {}, add_generation_prompt=False, continue_final_message=True
    )
    assert found == by_transformers(source, messages, prompt=False, final=True)
    assert "</m>" not in found[-5:]


def test_a_final_message_of_parts_stays_open():
    source = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}</m>{% endfor %}"
    final = {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    given = dict(add_generation_prompt=False, continue_final_message=True)
    assert ChatTemplate(source, "x").render([*HI, final], {}, **given) == "hi</m>ab"


@pytest.mark.parametrize(
    ("source", "messages", "prompt"),
    [
        (LOOP, HI, True),
        (LOOP, [{"role": "assistant", "tool_calls": []}], False),
        (
            "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
            [*HI, {"role": "assistant", "content": []}],
            False,
        ),
        (
            "{% for m in messages %}{{ m.content.split('x')[0] }}{% endfor %}",
            [{"role": "user", "content": "axb"}],
            False,
        ),
    ],
    ids=["also a new one", "no content", "no text", "cut by the template"],
)
def test_a_final_message_that_cannot_be_continued_is_refused(source, messages, prompt):
    with pytest.raises(RequestError) as caught:
        ChatTemplate(source, "x").render(
            messages, {}, add_generation_prompt=prompt, continue_final_message=True
        )
    assert caught.value.param == "continue_final_message"


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "continue_final_message"])
def test_a_variable_does_not_replace_what_the_request_says(name):
    with pytest.raises(RequestError, match=name):
        ChatTemplate(LOOP, "x").render(HI, {}, variables={name: "x"})
    same = {"add_generation_prompt": True, "continue_final_message": False}
    assert ChatTemplate(LOOP, "x").render(HI, {}, variables=same) == "user: hi\n"


# --- Content as a string or as parts ---

PARTS_ONLY = "{% for m in messages %}{{ m.role }}:{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %};{% endfor %}"
FIRST_PART = "{% for m in messages %}{{ m.content[0].text }};{% endfor %}"
TRIMMED = "{% for m in messages %}{{ m['content'].strip() }};{% endfor %}"
WRITTEN = "{% for m in messages %}{{ m['content'] }};{% endfor %}"
BOTH = "{% macro show(content) %}{% if content is string %}{{ content }}{% else %}{% for p in content %}[{{ p.text }}]{% endfor %}{% endif %}{% endmacro %}{% for m in messages %}{{ show(m.content) }};{% endfor %}"
SYSTEM_STRING = "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '!' }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %};{% endfor %}"


@pytest.mark.parametrize(
    ("source", "form", "text", "parts"),
    [
        (PARTS_ONLY, "parts", "user:ab;", "user:ab;"),
        (FIRST_PART, "parts", "ab;", "a;"),
        (TRIMMED, "string", "ab;", "a\nb;"),
        (WRITTEN, "string", "ab;", "a\nb;"),
        (BOTH, "both", "ab;", "[a][b];"),
    ],
    ids=["loops", "first", "strip", "written", "both"],
)
def test_a_content_comes_through_in_the_form_that_the_template_reads(source, form, text, parts):
    template = ChatTemplate(source, "x")
    assert (template.forms["user"], template.wants_parts) == (form, form == "parts")
    assert template.render([{"role": "user", "content": "ab"}], {}) == text
    given = [{"type": "text", "text": letter} for letter in "ab"]
    found = template.render([{"role": "user", "content": given}], {})
    assert found == (parts if form != "parts" or source is FIRST_PART else text)


def test_each_role_has_a_form_of_its_own():
    template = ChatTemplate(SYSTEM_STRING, "x")
    assert (template.forms["system"], template.forms["user"]) == ("string", "parts")
    parts = [{"type": "text", "text": "s"}]
    assert template.render([{"role": "system", "content": parts}, *HI], {}) == "s!;hi;"


@pytest.mark.parametrize(
    ("loop", "expected"), [("{% for p in c %}{{ p.text }}{% endfor %}", "hi"), ("{{ c }}", "hi")]
)
def test_where_short_conversations_are_rejected_the_syntax_tells_the_form(loop, expected):
    source = (
        "{% if messages|length < 5 %}{{ raise_exception('too short') }}{% endif %}"
        "{% for m in messages %}{% set c = m['content'] %}" + loop + ";{% endfor %}"
    )
    assert ChatTemplate(source, "x").render(HI * 5, {}) == 5 * f"{expected};"


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image' %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}",
        "{% for m in messages %}{{ m.content[0].words }}{% endfor %}",
    ],
)
def test_a_template_that_loses_the_parts_that_users_write_is_refused(source):
    with pytest.raises(CheckpointError, match="leaves out what a user writes"):
        ChatTemplate(source, "x").render(HI, {})


@pytest.mark.parametrize("source", ["{{ messages[0].text }}", "always the same"])
def test_a_template_that_loses_what_users_write_makes_no_prompt(tmp_path, source):
    tokenizer = folder_of(tmp_path, {"chat_template": source})
    with pytest.raises(CheckpointError, match="leaves out what a user writes"):
        tokenizer.apply_chat_template(HI)


# --- Templates that do harm ---

BOMBS = {
    "power": "{{ (((((10**64)**64)**64)**64)**64) % 7 }}",
    "power at run time": "{% set a = messages|length * 10 %}{{ (((((a**64)**64)**64)**64)**64) % 7 }}",
    "doubled list": "{% set x = ['a'] %}" + "{% set x = [x,x] %}" * 40 + "{{ x|tojson }}",
    "center": "{{ 'a'|center(2000000000) }}",
    "format": "{{ '%2000000000d'|format(1) }}",
    "batch": "{{ [1]|batch(500000000, 'x')|list }}",
    "repeated": "{{ messages[0].content * 2000000000 }}",
    "indented": "{{ messages|tojson(indent=500000000) }}",
    "joined": "{{ range(99999)|join('a' * 10000) }}",
    "nested parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "nested loops": "{% for i in [1] %}" * 300 + "{% endfor %}" * 300,
    "nested lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "a megabyte": "{{ messages[0].content }}{% if x %}y{% endif %}" * 25000,
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "long loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "range": "{{ range(10**9) }}",
    "attributes": "{{ ''.__class__.__mro__ }}",
    "attributes by format": "{{ '{0.__class__.__mro__}'.format(messages) }}{{ messages.__class__.__init__.__globals__ }}",
    "changed messages": "{{ messages.append(1) }}",
    "private names": "{% set ns = namespace(_x=1) %}",
    "too much text": "{% for i in range(99999) %}{{ 'abcdefghijklmnopqrstuvwxyz' }}{% endfor %}",
    "overflow": "{{ 10.0 ** 400 }}",
    "no block": "{% if %}",
    "unknown test": "{{ 1 is foo }}",
    "break outside": "{% break %}",
    "return outside": "{% set x = (yield 1) %}",
}
FAILING = {
    "zero": "{{ 1 / 0 }}",
    "lookup": "{{ [][5].x }}",
    "undefined": "{{ nothing.x }}",
    "wrong type": "{{ 1 + 'a' }}",
    "assertion": "{{ cycler() }}",
    "wrong value": "{{ 'x'|int(base='y') }}{{ '%d'|format('x') }}",
    "missing key": "{{ dict.fromkeys() }}",
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS.keys())
def test_a_harmful_template_is_stopped(source, monkeypatch):
    monkeypatch.setattr(rendering, "MAX_SECONDS", 0.3)
    with pytest.raises(CheckpointError) as caught:
        ChatTemplate(source, "some.jinja").render(HI, {})
    assert caught.value.code in ("chat-template-refused", "chat-template")
    assert caught.value.file == "some.jinja"
    assert ChatTemplate(LOOP, "x").render(HI, {}) == "user: hi\n"


@pytest.mark.parametrize("source", FAILING.values(), ids=FAILING.keys())
def test_a_template_that_fails_on_messages_is_an_error_of_the_request(source):
    with pytest.raises(RequestError) as caught:
        ChatTemplate(source, "x").render(HI, {})
    assert caught.value.param == "messages"


def test_a_templates_own_refusal_is_passed_on():
    source = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('a system message first') }}{% endif %}"
        + LOOP
    )
    with pytest.raises(RequestError, match="rejects these messages: a system message first"):
        ChatTemplate(source, "x").render(HI, {})


def test_a_refusal_is_shown_escaped_and_not_at_any_length():
    with pytest.raises(RequestError) as caught:
        ChatTemplate("{{ raise_exception('\x1b[31m' + 'a' * 99999) }}", "x").render(HI, {})
    assert "\\x1b[31maaa" in str(caught.value) and len(str(caught.value)) < 2000


def test_a_conversation_that_is_itself_too_large_is_an_error_of_the_request():
    source = (
        "{% for m in messages %}{{ m.content }}{% for c in m.content %}{{ c * 9 }}{% endfor %}{% endfor %}"
    )
    template = ChatTemplate(source, "x")
    assert len(template.render(HI, {})) == 20
    with pytest.raises(RequestError, match="too large for the chat template"):
        template.render([{"role": "user", "content": "a" * 400_000}], {})


def test_what_messages_bring_does_not_count_as_the_templates_text():
    text = "a" * (rendering.MAX_CHARACTERS + 1000)
    assert ChatTemplate(LOOP, "x").render([{"role": "user", "content": text}], {}) == f"user: {text}\n"


def test_a_slow_template_holds_up_no_other(monkeypatch):
    """Its own messages have at most so many processes at a time; another template's get theirs."""
    monkeypatch.setattr(rendering, "MAX_SECONDS", 0.3)
    slow = ChatTemplate(BOMBS["long loops"], "slow")
    failed = []

    def ask():
        with pytest.raises(CheckpointError) as caught:
            slow.render(HI, {})
        failed.append(str(caught.value))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    rendered = 0
    while any(thread.is_alive() for thread in threads):
        assert ChatTemplate(LOOP, "x").render(HI, {}) == "user: hi\n"
        rendered += 1
        time.sleep(0.01)
    assert len(failed) == 3 and all("too long" in text for text in failed)
    assert rendered > 3


def test_a_template_that_was_stopped_on_one_word_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(rendering, "MAX_SECONDS", 0.3)
    template = ChatTemplate(BOMBS["long loops"], "slow")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="too long"):
            template.render(HI, {})
        monkeypatch.setattr(RENDERER, "process", lambda: pytest.fail("it was tried"))


def test_what_stops_one_role_alone_does_not_stop_the_others():
    source = "{% for m in messages %}{% if m.role == 'system' %}{{ range(10**9) }}{% endif %}{{ m.content }}{% endfor %}"
    template = ChatTemplate(source, "x")
    assert template.render(HI, {}) == "hi"
    with pytest.raises(CheckpointError, match="Range too big"):
        template.render(TALK, {})
    assert template.render(HI, {}) == "hi"


def test_many_threads_render_at_once():
    template, texts = ChatTemplate(LOOP, "x"), {}

    def ask(number):
        texts[number] = template.render([{"role": "user", "content": str(number)}], {})

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {number: f"user: {number}\n" for number in range(32)}


def children(pid):
    """List the processes of a parent, as (process, state)."""
    found = []
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid:
            found.append((int(entry), state))
    return found


linux = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc")


@linux
def test_ended_processes_leave_nothing_behind():
    RENDERER.close()
    before = set(children(os.getpid()))
    for source in ("{{ 'a'|center(2000000000) }}", BOMBS["power"], LOOP):
        with contextlib.suppress(PymllmError):
            ChatTemplate(source, "x").render(HI, {})
    RENDERER.close()
    assert {pid for pid, _ in children(os.getpid())} <= {pid for pid, _ in before}
    assert not any(state == "Z" for _, state in set(children(os.getpid())) - before)


@linux
def test_a_process_that_was_ended_from_outside_is_replaced():
    template = ChatTemplate(LOOP, "x")
    template.render(HI, {})
    for process in RENDERER._idle:
        os.kill(process.process.pid, signal.SIGKILL)
        process.process.wait()
    assert template.render(HI, {}) == "user: hi\n"


@linux
def test_a_process_has_limits_of_its_own_and_no_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    RENDERER.close()
    ChatTemplate(LOOP, "x").render(HI, {})
    pid = RENDERER._idle[-1].process.pid
    with open(f"/proc/{pid}/limits", encoding="utf-8") as file:
        limits = dict(re.findall(r"^(Max [a-z ]+?) {2,}(\S+)", file.read(), re.M))
    assert limits["Max address space"] == str(rendering.MAX_MEMORY)
    assert limits["Max cpu time"] != "unlimited"
    with open(f"/proc/{pid}/environ", "rb") as file:
        assert b"secret" not in file.read()
    with open(f"/proc/{pid}/maps", encoding="utf-8") as file:
        assert "torch" not in file.read()


# --- Where templates come from ---


def folder_of(tmp_path, config=None, **files):
    for name, text in files.items():
        target = tmp_path / name.replace("__", "/")
        target = target.with_suffix(".jinja")
        target.parent.mkdir(exist_ok=True)
        target.write_text(text)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return Tokenizer(tmp_path)


NAMED = [{"name": name, "template": f"{name} {LOOP}"} for name in ("default", "tool_use", "rag")]


def test_a_list_of_named_templates_is_chosen_from_as_transformers_does(tmp_path):
    tokenizer = folder_of(tmp_path, {"chat_template": NAMED})
    assert list(tokenizer.chat_templates) == ["default", "tool_use", "rag"]
    assert tokenizer.render_chat(HI).startswith("default ")
    assert tokenizer.render_chat(HI, tools=TOOLS).startswith("tool_use ")
    assert tokenizer.chat_template.source == NAMED[0]["template"]


def test_files_of_further_templates_come_before_the_config(tmp_path):
    files = {"chat_template": "one " + LOOP, "additional_chat_templates__tool_use": "two " + LOOP}
    tokenizer = folder_of(tmp_path, {"chat_template": "no"}, **files)
    assert tokenizer.render_chat(HI) == "one user: hi\n"
    assert tokenizer.render_chat(HI, tools=TOOLS) == "two user: hi\n"


def test_only_a_template_for_tools_is_none_for_other_chats(tmp_path):
    tokenizer = folder_of(tmp_path, {"chat_template": NAMED[1:]})
    with pytest.raises(ConfigError, match="rag, tool_use"):
        tokenizer.render_chat(HI)
    assert tokenizer.render_chat(HI, tools=TOOLS).startswith("tool_use ")


@pytest.mark.parametrize("bad", [5, [1], ["a"], [{"name": "default"}], [{"name": 1, "template": "x"}]])
def test_what_is_no_template_is_refused(tmp_path, bad):
    with pytest.raises(CheckpointError, match="chat template cannot be read"):
        folder_of(tmp_path, {"chat_template": bad}).render_chat(HI)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_templates(tmp_path, {})


def test_no_template_at_all_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no chat template"):
        choose_template({}, False, tmp_path)


def test_a_users_template_is_a_file_or_the_text_itself(tmp_path):
    (tmp_path / "my.jinja").write_text(LOOP)
    assert chat_template_of(str(tmp_path / "my.jinja")).render(HI, {}) == "user: hi\n"
    assert chat_template_of(tmp_path / "my.jinja").source == LOOP
    assert chat_template_of(LOOP).render(HI, {}) == "user: hi\n"
    for bad in ("missing.jinja", tmp_path, "{{ no"):
        with pytest.raises(PymllmError):
            chat_template_of(bad)


def test_older_folders_name_their_special_tokens_in_a_file(tmp_path):
    tokenizer = folder_of(tmp_path, {"eos_token": {"content": "</s>"}, "pad_token": None})
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "x"}')
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
