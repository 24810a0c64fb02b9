"""The chat in a real browser: with the shipped model, and with what a scripted server says."""

from __future__ import annotations

import contextlib
import json
import threading

import httpx
import pytest
from fastapi.responses import JSONResponse, PlainTextResponse

from pymllm.engine.session import Session
from pymllm.server.refusals import error_body
from tests.page.scripted import deltas, said
from tests.processes import SECONDS
from tests.server.conftest import MODEL, serve

DONE = "document.querySelector('.answer:last-child')?.dataset.state === 'done'"
FAILED = "document.querySelector('.answer:last-child')?.dataset.state === 'failed'"
READY = "document.querySelector('#model').value"
QUESTION = "Write a function `read_lines`: read a text file."


@contextlib.contextmanager
def opened(browser, url, **look):
    """The page, ready; whatever the test does, the page must not complain, nor ask anybody but its server."""
    with browser.page(url, **look) as page:
        page.wait(READY)
        yield page
        assert page.complaints == []
        assert [asked for asked in page.requests if not asked.startswith(f"{url}/")] == []


def ask(page, text, until=DONE):
    page.click("#input")
    page.type(text)
    page.press("Enter")
    page.wait(until)


def set_field(page, name, value):
    if not page.run("document.querySelector('#settings').checkVisibility()"):
        page.click("#settings-button")
    page.click(f"#{name}")
    page.run(f"document.querySelector('#{name}').select()")
    page.type(value)


def reply_to(served, text, **settings):
    body = {"messages": [{"role": "user", "content": text}], **settings}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=SECONDS).json()
    return answer["choices"][0]["message"]["content"], answer["usage"]


def test_an_answer_of_the_shipped_model_is_streamed_counted_and_kept(browser, served):
    with opened(browser, served.url) as page:
        assert page.text("#hello-model") == MODEL
        set_field(page, "temperature", "0")
        set_field(page, "max_tokens", "40")
        ask(page, QUESTION)
        expected, usage = reply_to(served, QUESTION, temperature=0, max_tokens=40)
        kept = json.loads(page.run("localStorage.getItem('pymllm.conversation')"))["messages"]
        assert [message["content"] for message in kept] == [QUESTION, expected]
        assert kept[1]["pieces"] > 1, "it came in pieces"
        # What is seen has the words, but for the marks of markdown.
        shown = page.text(".answer > .markdown")
        assert shown.split()[0] == expected.replace("*", "").replace("`", "").split()[0]
        assert page.text("[data-fact=tokens]") == f"{usage['completion_tokens']} tokens"
        assert page.text("[data-fact=prompt]").startswith(f"{usage['prompt_tokens']} read")
        page.reload()
        page.wait(READY)
        assert page.text(".answer > .markdown") == shown and page.text(".bubble") == QUESTION
        ask(page, "Again.")
        turns = json.loads(page.run("localStorage.getItem('pymllm.conversation')"))["messages"]
        cached = turns[3]["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= 16 and f"{cached} from the cache" in page.text(
            ".answer:last-child [data-fact=prompt]"
        )
        page.click("#live-link")
        assert page.text("[data-figure=cached] dd") == str(cached)
        page.click("#chat-link")
        page.click("#clear")
        page.wait("document.querySelectorAll('.message').length === 0")
        assert page.run("localStorage.getItem('pymllm.conversation')") is None


def test_stopping_gives_the_place_back(browser, llm, monkeypatch):
    """The model stands still in mid-answer until the page has stopped it; then another request finds the only place."""
    go_on, steps, step = threading.Event(), [], Session.step

    def halting(self):
        steps.append(1)
        if len(steps) > 12:
            assert go_on.wait(SECONDS)
        return step(self)

    monkeypatch.setattr(Session, "step", halting)
    with serve(llm, max_running=1, max_waiting=0) as served, opened(browser, served.url) as page:
        ask(page, QUESTION, "document.querySelector('.answer')?.dataset.state === 'running'")
        page.wait("document.querySelector('.answer > .markdown').innerText.length > 3")
        assert httpx.post(f"{served.url}/v1/completions", json={"prompt": "x"}).status_code == 503
        assert page.run("document.querySelector('#send').hidden")
        page.click("#stop")
        page.wait("document.querySelector('.answer').dataset.state === 'stopped'")
        assert "Stopped" in page.texts(".facts span")
        go_on.set()
        with httpx.Client(timeout=SECONDS) as client:
            body = {"prompt": "x", "max_tokens": 1}
            while client.post(f"{served.url}/v1/completions", json=body).status_code == 503:
                pass
        # Escape stops, too; and what was said so far goes on with the conversation.
        go_on.clear()
        steps.clear()
        ask(page, "Go on.", "document.querySelector('.answer:last-child > .markdown').innerText.length > 3")
        page.press("Escape")
        page.wait("document.querySelector('.answer:last-child').dataset.state === 'stopped'")
        go_on.set()


def test_the_key_is_asked_for_kept_in_the_tab_and_sent(browser, llm):
    with serve(llm, api_key="secret") as served, browser.page(f"{served.url}/#plan") as page:
        page.wait("document.querySelector('#key-dialog').open")
        assert "llama" not in page.run("document.documentElement.outerHTML"), (
            "nothing is told of the model before"
        )
        page.type("wrong")
        page.press("Enter")
        page.wait("document.querySelector('#key-refused').checkVisibility()")
        page.type("secret")
        page.press("Enter")
        page.wait(READY)
        page.wait("document.querySelectorAll('.layers tbody tr').length")
        assert page.run("sessionStorage.getItem('pymllm.key')") == '"secret"'
        assert page.run("localStorage.getItem('pymllm.key')") is None
        assert not any("secret" in url for url in page.requests)
        page.reload()
        page.wait(READY)
        assert not page.run("document.querySelector('#key-dialog').open")
        page.click("#chat-link")
        set_field(page, "max_tokens", "3")
        ask(page, "x")
        page.click("#forget-key")
        page.wait("document.querySelector('#key-dialog').open")
        page.press("Escape")
        page.wait("document.querySelector('#start-error').checkVisibility()")
        assert "Incorrect API key" in page.text("#start-error")


def test_a_refusal_names_its_parameter_and_can_be_asked_again(browser, served):
    with opened(browser, served.url) as page:
        set_field(page, "system", "x " * 3000)
        ask(page, "x", FAILED)
        problem = page.text(".problem")
        assert problem.startswith("400 · ") and "messages" in problem and "1024" in problem
        set_field(page, "system", "Be brief.")
        set_field(page, "max_tokens", "3")
        page.click(".problem .primary")
        page.wait(DONE)
        assert page.count(".answer") == 1


def test_a_setting_that_cannot_be_sent_is_shown_at_its_field(browser, script):
    with opened(browser, script.url) as page:
        set_field(page, "temperature", "warm")
        assert page.text("#temperature-hint") == "Expected a number"
        page.click("#settings-close")
        page.click("#input")
        page.type("x")
        page.press("Enter")
        page.wait("document.activeElement.id === 'temperature'")
        assert script.asked == []


def test_what_is_asked_for(browser, script):
    script.answers = [said("One."), said("Two."), said("Three.")]
    with opened(browser, script.url) as page:
        page.run("document.querySelector('#model').value = 'poems'")
        page.run("document.querySelector('#model').dispatchEvent(new Event('change'))")
        for name, value in {
            "system": "Be brief.",
            "temperature": "0.5",
            "max_tokens": "64",
            "seed": "-3",
            "top_p": "1",
        }.items():
            set_field(page, name, value)
        page.run("document.querySelector('#thinking').value = 'off'")
        ask(page, "a <b>")
        ask(page, "c")
        assert script.asked[1] == {
            "model": "poems",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "a <b>"},
                {"role": "assistant", "content": "One."},
                {"role": "user", "content": "c"},
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.5,
            "top_p": 1,
            "max_tokens": 64,
            "seed": -3,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        page.reload()
        page.wait(READY)
        assert page.run("document.querySelector('#model').value") == "poems"
        assert page.run("document.querySelector('#system').value") == "Be brief."


def test_by_default_nothing_is_asked_for_but_the_answer(browser, script):
    script.answers = [said("One.")]
    with opened(browser, script.url) as page:
        ask(page, "x")
        assert set(script.asked[0]) == {"model", "messages", "stream", "stream_options"}


def test_messages_are_edited_and_answers_asked_for_again(browser, script):
    script.answers = [said(text) for text in ("One.", "Two.", "Three.", "Four.")]
    with opened(browser, script.url) as page:
        ask(page, "first")
        ask(page, "second")
        page.click(".answer:last-child [aria-label='Another answer']")
        page.wait("document.querySelector('.answer:last-child > .markdown').innerText === 'Three.'")
        page.click(".user [aria-label='Edit this message']")
        page.run("document.activeElement.select()")
        page.type("changed")
        page.press("Enter")
        page.wait("document.querySelector('.answer:last-child > .markdown').innerText === 'Four.'")
        assert page.texts(".bubble") == ["changed"] and page.texts(".answer > .markdown") == ["Four."]
        asked = [[message["content"] for message in body["messages"]] for body in script.asked]
        assert asked == [["first"], ["first", "One.", "second"], ["first", "One.", "second"], ["changed"]]


def test_thinking_is_shown_apart(browser, script):
    script.answers = [
        deltas(
            {"reasoning_content": "Let me "},
            {"reasoning_content": "see."},
            {"content": "It is "},
            {"content": "**4**."},
        ),
        said("Yes."),
    ]
    with opened(browser, script.url) as page:
        ask(page, "2 + 2?")
        assert page.text(".answer > .markdown") == "It is 4."
        assert page.text(".thinking summary").startswith("Thought for")
        assert not page.run("document.querySelector('.thinking').open"), "it closes when the answer begins"
        page.click(".thinking summary")
        assert page.text(".thinking .markdown") == "Let me see."
        ask(page, "Sure?")
        assert script.asked[1]["messages"][1] == {"role": "assistant", "content": "It is **4**."}
        assert page.run("document.querySelector('.thinking').open"), "the reader's choice stays"


def test_calls_of_tools_are_shown_and_their_results_sent_back(browser, script):
    pieces = [
        {"tool_calls": [{"index": 0, "id": "call_1", "function": {"name": "weather", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": "<b>'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": 'Bern"}'}}]},
        {"tool_calls": [{"index": 1, "id": "call_2", "function": {"name": "time", "arguments": "{}"}}]},
    ]  # fmt: skip
    script.answers = [deltas(*pieces, reason="tool_calls"), said("Rain.")]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    with opened(browser, script.url) as page:
        set_field(page, "tools", "[not json")
        assert page.text("#tools-hint").startswith("Expected a JSON list")
        set_field(page, "tools", json.dumps(tools))
        page.click("#settings-close")
        ask(page, "Weather in Bern?")
        assert script.asked[0]["tools"] == tools
        assert page.texts(".call code") == ["weather", "time"]
        assert json.loads(page.text(".call pre")) == {"city": "<b>Bern"}
        for text in ("wet", "noon"):
            page.click(".call form textarea")
            page.type(text)
            page.click(".call form button")
        page.wait("document.querySelector('.answer:last-child > .markdown').innerText === 'Rain.'")
        call, first, second = script.asked[1]["messages"][1:]
        assert call["content"] is None
        assert [one["function"] for one in call["tool_calls"]] == [
            {"name": "weather", "arguments": '{"city": "<b>Bern"}'},
            {"name": "time", "arguments": "{}"},
        ]
        assert first == {"role": "tool", "tool_call_id": "call_1", "content": "wet"}
        assert second == {"role": "tool", "tool_call_id": "call_2", "content": "noon"}
        assert page.texts(".tool-result pre") == ["wet", "noon"]


def test_a_hostile_answer_is_text_wherever_it_comes(browser, script):
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    call = {"index": 0, "id": evil, "type": "function", "function": {"name": evil, "arguments": evil}}
    script.answers = [
        deltas({"reasoning_content": evil},
               {"content": f"{evil}\n\n[x](javascript:alert(3))\n\n# {evil}\n\n```{evil}\n{evil}\n```"},
               {"tool_calls": [call]}),
        JSONResponse({"error": {"message": evil, "param": evil, "code": evil}}, 400),
        PlainTextResponse(evil, 502),
    ]  # fmt: skip
    script.plan = {"model_type": evil, "definition": evil}
    with opened(browser, script.url) as page:
        ask(page, evil)
        for _ in range(2):
            ask(page, evil, FAILED)
            assert evil in page.text(".answer:last-child .problem")
        page.click(".thinking summary")
        assert page.text(".thinking .markdown") == evil
        assert page.text(".call code") == page.text(".call pre") == evil
        page.reload()
        page.wait(READY)
        assert page.text(".call pre") == evil
        assert page.count("#messages script, #messages img, #messages [onerror], #messages a") == 0


def busy():
    return JSONResponse(
        error_body(503, "too many requests are waiting", code="overloaded"), 503, {"Retry-After": "7"}
    )


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (busy(), ["503 · The server is busy", "too many requests are waiting", "overloaded", "7 s"]),
        (JSONResponse(error_body(400, "temperature is out of range", param="temperature", code="parameter"), 400),
         ["400 · The request was refused", "temperature is out of range", "param\ntemperature", "code\nparameter"]),
        (PlainTextResponse("bad gateway", 502), ["502 · The server failed", "bad gateway"]),
        ([*said("Half")[:2], json.dumps(error_body(500, "a kernel failed"))],
         ["500 · The server failed", "a kernel failed"]),
        (said("Half")[:2], ["No answer", "The connection ended before the answer did."]),
        (["{broken"], ["No answer", "not JSON"]),
    ],
)  # fmt: skip
def test_an_error_is_shown_in_full_and_asked_again(browser, script, answer, shown):
    script.answers = [answer, said("Now it does.")]
    with opened(browser, script.url) as page:
        ask(page, "x", FAILED)
        problem = page.text(".problem")
        for text in shown:
            assert text in problem
        if isinstance(answer, list) and len(answer) > 1:
            assert page.text(".answer > .markdown") == "Half"[:6], "what came stays"
        page.click(".problem .primary")
        page.wait(DONE)
        assert page.texts(".answer > .markdown") == ["Now it does."]
        assert script.asked[0] == script.asked[1]


def test_a_server_that_has_gone_is_said_to_be(browser, script):
    with opened(browser, script.url) as page:
        page.call(
            "Network.emulateNetworkConditions",
            offline=True,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )
        ask(page, "x", FAILED)
        assert "The server cannot be reached" in page.text(".problem")


@pytest.mark.parametrize(
    "kept",
    ["{", "null", "[]", '{"version": 1}',
     '{"version": 1, "messages": [null, 3, {"role": "assistant"}, {"role": "user", "content": {}}]}',
     '{"version": 9, "messages": [{"role": "user", "content": "x"}]}'],
)  # fmt: skip
def test_a_kept_conversation_that_cannot_be_read_is_none(browser, script, kept):
    with opened(browser, script.url) as page:
        page.run(
            f"localStorage.setItem('pymllm.conversation', {json.dumps(kept)}); "
            "localStorage.setItem('pymllm.settings', '[3]')"
        )
        # What the page keeps as it goes must not replace it.
        page.run("Storage.prototype.setItem = () => {}; Storage.prototype.removeItem = () => {}")
        page.reload()
        page.wait(READY)
        assert page.count(".message") == 0


def test_everything_is_reached_by_keyboard(browser, script):
    script.answers = [said("Hello.")]
    with opened(browser, script.url) as page:
        focusable = "a, button, input, select, textarea"
        assert page.run(f"document.querySelector('{focusable}').className") == "skip", "it is the first"
        page.run("document.querySelector('.skip').focus()")
        reached = set()
        for _ in range(12):
            page.press("Tab")
            reached.add(page.run("document.activeElement.id || document.activeElement.textContent"))
        assert {
            "chat-link",
            "plan-link",
            "live-link",
            "theme",
            "settings-button",
            "input",
            "model",
        } <= reached
        page.run("document.querySelector('#input').focus()")
        page.type("one")
        page.press("Shift+Enter")
        assert script.asked == []
        page.press("Enter")
        page.wait(DONE)
        assert page.run("document.activeElement.id") == "input"
        named = page.run(
            "[...document.querySelectorAll('button, input, select, textarea, a')].filter((e) => e.checkVisibility() && "
            "!(e.ariaLabel || e.labels?.length || e.innerText.trim())).map((e) => e.outerHTML)"
        )
        assert named == []


def luminance(colour):
    return sum(float(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3])


def test_dark_and_light(browser, script):
    with opened(browser, script.url, dark=True) as page:
        assert (
            luminance(page.style("body", "background-color")) < 120 < luminance(page.style("body", "color"))
        )
        page.click("#theme")
        assert luminance(page.style("body", "background-color")) > 600
        page.reload()
        page.wait(READY)
        assert luminance(page.style("body", "background-color")) > 600, "the choice stays"
    with opened(browser, script.url) as page:
        assert luminance(page.style("body", "background-color")) > 600


def test_nothing_is_wider_than_a_phone(browser, script, llm):
    long = (
        "A "
        + "very" * 60
        + " long word, `"
        + "x" * 300
        + "`\n\n```\n"
        + "y" * 300
        + "\n```\n\n|"
        + "a|" * 30
        + "\n|"
        + "-|" * 30
    )
    script.answers, script.plan = [said(long)], llm.plan.to_dict()
    with opened(browser, script.url, width=360, height=740, phone=True) as page:
        ask(page, "w" * 200)
        for view in ("chat", "plan", "live"):
            page.click(f"#{view}-link")
            page.wait(f"!document.querySelector('#{view}').hidden")
            assert page.run("document.documentElement.scrollWidth") <= 360, view
        page.click("#chat-link")
        page.click("#settings-button")
        assert page.run("document.querySelector('#settings').getBoundingClientRect().width") <= 360
