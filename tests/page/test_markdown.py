"""How answers are read: markdown as elements, hostile text as text, and none that costs more than its length."""

from __future__ import annotations

import json

import pytest

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)><iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "</div></main><style>*{display:none}</style><base href=//evil>",
    "[click](javascript:alert(1)) [click](JaVaScRiPt:alert(1)) [click](data:text/html,<script>alert(1)</script>)",
    "[x](https://a\"onmouseover=alert(1)) [x](https://example.com/'><script>alert(1)</script>)",
    "![track](https://evil.example/pixel.png)",
    "```html onload=alert(1)\n<script>alert(1)</script>\n```",
    "`<b onclick=alert(1)>`",
    "| <img src=x onerror=alert(1)> | b |\n|---|---|\n| <script>alert(1)</script> | **<i>x</i>** |",
    "> <img src=x onerror=alert(1)>\n\n- <script>alert(1)</script>\n\n# <script>alert(1)</script>",
    "\u202e<script>alert(1)</script>\u2028<script>alert(1)</script>\x00",
    "__proto__ constructor {{7*7}} ${alert(1)} &lt;script&gt;",
]  # fmt: skip


@pytest.fixture(scope="module")
def page(browser, served):
    with browser.page(served.url) as page:
        page.run(
            "import('/page/markdown_view.js').then(({ MarkdownView }) => { window.show = (text) => { "
            "const view = new MarkdownView(); view.update(text); document.body.append(view.element); return view; }; })"
        )
        yield page


KNOWN = {"p", "div", "pre", "code", "span", "button", "svg", "path", "strong", "em", "a", "ul", "li", "blockquote",
         "table", "thead", "tbody", "tr", "th", "td", "h3"}  # fmt: skip


def outline(page, text):
    """What a text becomes: [tag, its children] or text."""
    script = (
        "(() => { const outline = (node) => node.nodeType === 3 ? node.data : "
        "[node.localName, ...[...node.childNodes].map(outline)]; "
        f"const {{ element }} = show({json.dumps(text)}); element.remove(); "
        "return [...element.childNodes].map(outline); })()"
    )
    return page.run(script)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one\ntwo\n\nthree", [["p", "one\ntwo"], ["p", "three"]]),
        ("# A\n### B ##", [["h3", "A"], ["h5", "B"]]),
        ("a **b *c* d** `e*f*`", [["p", "a ", ["strong", "b ", ["em", "c"], " d"], " ", ["code", "e*f*"]]]),
        ("snake_case_name and 2 * 3 * 4", [["p", "snake_case_name and 2 * 3 * 4"]]),
        ("_a_ __b__ ~~c~~", [["p", ["em", "a"], " ", ["strong", "b"], " ", ["s", "c"]]]),
        ("***d***", [["p", ["strong", ["em", "d"]]]]),
        ("**open and *open", [["p", "**open and *open"]]),
        (r"\*not\* \<b>", [["p", "*not* <b>"]]),
        ("``a ` b``", [["p", ["code", "a ` b"]]]),
        ("- a\n- b\n  - c\n- d", [["ul", ["li", "a"], ["li", "b", ["ul", ["li", "c"]]], ["li", "d"]]]),
        ("3. a\n\n4. b", [["ol", ["li", "a"], ["li", "b"]]]),
        ("> a\n> - b", [["blockquote", ["p", "a"], ["ul", ["li", "b"]]]]),
        ("---", [["hr"]]),
        ("[t](https://e.org/a_(b)) x", [["p", ["a", "t"], " x"]]),
        ("see https://e.org/x.", [["p", "see ", ["a", "https://e.org/x"], "."]]),
        ("| a | b |\n|:-:|--:|\n| 1 | `2` |",
         [["div", ["table", ["thead", ["tr", ["th", "a"], ["th", "b"]]],
                   ["tbody", ["tr", ["td", "1"], ["td", ["code", "2"]]]]]]]),
        ("```a``` is code", [["p", ["code", "a"], " is code"]]),
        ("    indented\n        more", [["p", "    indented\n        more"]]),
    ],
)  # fmt: skip
def test_markdown_becomes_elements(page, text, expected):
    assert outline(page, text) == expected


def test_a_code_block_has_its_text_and_its_language(page):
    shown = outline(page, "before\n```python\ndef f():\n    return '<b>'\n\n# **x**\n```\nafter")
    assert [block[0] for block in shown] == ["p", "div", "p"]
    assert shown[1][1][1] == ["span", "python"]
    assert shown[1][2] == ["pre", ["code", "def f():\n    return '<b>'\n\n# **x**"]]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text(page, text):
    complaints, asked = len(page.complaints), len(page.requests)
    own = page.requests[0].split("/")[2]  # which the page asks for its figures now and then
    page.run(f"void (window.shown = show({json.dumps(text)}).element)")
    tags = page.run("[...shown.querySelectorAll('*')].map((e) => e.localName)")
    assert set(tags) <= KNOWN
    attributes = page.run(
        "[...shown.querySelectorAll('*')].flatMap((e) => [...e.attributes].map((a) => a.name))"
    )
    assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcdoc", "style")]
    links = page.run("[...shown.querySelectorAll('a')].map((e) => [new URL(e.href).protocol, e.rel])")
    assert all(protocol in ("http:", "https:") and "noopener" in rel for protocol, rel in links)
    page.run("shown.remove()")
    assert len(page.complaints) == complaints
    assert all(url.split("/")[2] == own for url in page.requests[asked:])


@pytest.mark.parametrize("text", HOSTILE)
def test_every_beginning_of_a_text_is_shown_and_ends_as_the_whole(page, text):
    streamed = page.run(
        f"(() => {{ const text = {json.dumps(text)}; const view = show(''); "
        "for (let end = 1; end <= text.length; end += 1) view.update(text.slice(0, end)); "
        "view.element.remove(); return view.element.innerText; })()"
    )
    assert streamed == page.run(
        f"(() => {{ const {{ element }} = show({json.dumps(text)}); element.remove(); return element.innerText; }})()"
    )


# What is counted instead of time: characters that searches and regular expressions were given, and what came of them.
COUNT = """
(async () => {
  const { blocksOf } = await import("/page/markdown.js");
  const { spansOf } = await import("/page/inline.js");
  let steps = 0;
  const { indexOf } = String.prototype, { exec } = RegExp.prototype;
  String.prototype.indexOf = function (text, from = 0) {
    const found = indexOf.call(this, text, from);
    steps += (found < 0 ? this.length : found) - from;
    return found;
  };
  RegExp.prototype.exec = function (text) { steps += text.length; return exec.call(this, text); };
  const spans = (text) => { for (const span of spansOf(text)) steps += 1; };
  const walk = (blocks) => {
    for (const block of blocks) {
      steps += 1;
      if (block.text && block.kind !== "code") spans(block.text);
      walk(block.blocks ?? []);
      (block.items ?? []).forEach(walk);
      (block.rows ?? []).flat().forEach(spans);
    }
  };
  const counts = [];
  for (const size of [20000, 80000]) {
    steps = 0;
    walk(blocksOf(PIECE.repeat(size / PIECE.length)));
    counts.push(steps);
  }
  Object.assign(String.prototype, { indexOf });
  Object.assign(RegExp.prototype, { exec });
  return counts;
})()
"""


@pytest.mark.parametrize(
    "piece",
    ["*a ", "**a ", "_a ", "*a*", "**a*", "*", "_",
     "a_", "__a_", "*a **b ", "`", "`a``", "`` ` ", "[", "[a](",
     "[a](https://", "[a](https://x(", "[[a]", "> ", "> - ", "- ", "- a\n\n", "  - a\n    - b\n", " " * 50 + "- a\n",
     "# ", "# a#\n", "|", "|-", "|a\n", "-", "- -", "\\", "h", "https://", "https://a.....", "~~", "***", "1. ", "\n",
     " ", "```\n", "a\n|-|\n", "<", "# #  "],
)  # fmt: skip
def test_no_text_costs_more_than_its_length(page, piece):
    """Four times the text is about four times the work: what is hostile cannot stop the page."""
    short, long = page.run(COUNT.replace("PIECE", json.dumps(piece)))
    assert long <= 5 * short + 1000
