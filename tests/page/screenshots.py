"""Make the pictures of the page in docs/images/: python -m tests.page.screenshots MODEL [NAME]

MODEL: a checkpoint that chats: the file that `make real-model` fetches.  NAME: what it is called in the pictures.
The picture of thinking and tools shows scripted answers, as a small model gives none.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

import pymllm
from tests.page.browser import Page, find_chromium, started_browser
from tests.page.scripted import deltas, scripted_server
from tests.server.conftest import serve

FOLDER = Path(__file__).parents[2] / "docs" / "images"
DONE = "document.querySelector('.answer:last-child')?.dataset.state === 'done'"
RULES = {"**.layers.0.**": "none", "**.mlp.down_proj": "int8", "**.layers.1.**": "nvfp4"}
QUESTIONS = ("What is 2 + 2?", "Write a sentence about the sea.")
THOUGHT = "The user asks for the weather in Bern. There is a tool for that, which needs the name of a city."
CALL = {
    "index": 0,
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Bern"}'},
}
TOLD = """It rains in Bern, at **11 °C**. In Python:

```python
def wear(celsius: float, rain: bool) -> str:
    return "a coat" if rain or celsius < 12 else "a shirt"
```

| hour | °C | rain |
|---|--:|--:|
| 12 | 11 | 80 % |
| 18 | 9 | 60 % |
"""


def ask(page: Page, text: str) -> None:
    page.click("#input")
    page.type(text)
    page.press("Enter")
    page.wait(DONE)


def take(page: Page, name: str) -> None:
    """Write a picture, in as many colours as keep it small."""
    path = FOLDER / f"page-{name}.png"
    page.run("document.fonts.ready.then(() => document.activeElement.blur())")
    page.run("new Promise((done) => setTimeout(done, 400))")
    page.picture(path)
    Image.open(path).convert("RGB").quantize(192, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def main(model: str, name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    chromium, why_not = find_chromium()
    if chromium is None:
        sys.exit(why_not)
    llm = pymllm.LLM(model, quant=RULES, progress=False)
    llm.chat([{"role": "user", "content": "Hello!"}])  # what is made once is made
    with serve(llm, model_name=name) as served, started_browser(chromium) as browser:
        with browser.page(served.url) as page:
            page.wait("document.querySelector('#model').value")
            page.run(
                "document.querySelector('#temperature').value = 0; document.querySelector('#max_tokens').value = 160"
            )
            for question in QUESTIONS:
                ask(page, question)
            take(page, "chat")
            page.click("#plan-link")
            page.wait("document.querySelectorAll('.layer').length")
            page.hover(".layer[data-prefix$='layers.3.mlp.down_proj']")
            page.run("window.scrollTo(0, 0)")
            take(page, "plan")
        with browser.page(f"{served.url}/#plan", dark=True) as page:
            page.wait("document.querySelectorAll('.layer').length")
            page.click("#colour-by button:nth-child(2)")
            page.hover(".layer[data-prefix$='layers.3.self_attn.q_proj']")
            page.run("window.scrollTo(0, 0)")
            take(page, "dark")
    with scripted_server() as script, started_browser(chromium) as browser:
        script.plan, script.pause = llm.plan.to_dict(), 0.02
        for look, label in (({}, "thinking"), ({"width": 390, "height": 800, "phone": True}, "phone")):
            thoughts = [{"reasoning_content": THOUGHT[at : at + 4]} for at in range(0, len(THOUGHT), 4)]
            words = [{"content": TOLD[at : at + 4]} for at in range(0, len(TOLD), 4)]
            script.answers = [
                deltas(*thoughts, {"tool_calls": [CALL]}, reason="tool_calls", tokens=len(thoughts) + 1),
                deltas(*words, tokens=len(words)),
            ]
            with browser.page(script.url, **look) as page:
                page.wait("document.querySelector('#model').value")
                ask(page, "What is the weather in Bern, and what should I wear?")
                if label == "thinking":
                    page.click(".thinking summary")
                page.click(".call textarea")
                page.type('{"celsius": 11, "rain": true}')
                page.click(".call form button")
                page.wait("document.querySelectorAll('.answer').length === 2 && " + DONE)
                if label == "thinking":
                    page.run("window.scrollTo(0, 0)")
                take(page, label)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else Path(sys.argv[1]).stem)
