"""The plan on the page: its numbers are those of /plan, its picture and its table show each layer and why."""

from __future__ import annotations

import httpx
import pytest

LAYERS = "document.querySelectorAll('#table-body tr[data-prefix]').length"


@pytest.fixture(scope="module")
def plan(served):
    return httpx.get(f"{served.url}/plan").json()


@pytest.fixture
def page(browser, served):
    with browser.page(f"{served.url}/#plan") as page:
        page.wait(LAYERS)
        yield page
        assert page.complaints == []


def shown_layers(page):
    return page.run(
        "[...document.querySelectorAll('#table-body tr[data-prefix]')].map((row) => row.dataset.prefix)"
    )


def test_the_numbers_are_the_plan_s(page, plan):
    rows = page.run(
        "[...document.querySelectorAll('#table-body tr[data-prefix]')].map((row) => [row.dataset.prefix, "
        "...['Kind', 'Method', 'Kernel', 'Shape'].map((title) => row.querySelector(`[data-title=${title}]`)"
        ".innerText), "
        "Number(row.querySelector('[data-bytes]').dataset.bytes)])"
    )
    expected = [
        [
            one["prefix"],
            one["kind"],
            one["method_detail"],
            one["kernel"],
            " × ".join(map(str, one["shape"])),
            one["bytes"],
        ]
        for one in plan["layers"]
    ]
    assert rows == expected
    for total in ("weight_bytes", "peak_load_bytes", "kv_cache_bytes_per_token"):
        assert (
            page.run(f"Number(document.querySelector('[data-total={total}]').dataset.value)")
            == plan["totals"][total]
        )
    assert f"{plan['totals']['weight_bytes'] / 1e6:.2f} MB" in page.text("[data-total=weight_bytes]")
    assert f"{plan['kv_cache']['tokens']:,} tokens" in page.text("[data-total=kv_cache]")
    nothing = ["Nothing was skipped, and nothing else is to be said."]
    assert page.texts("#plan-notes li") == (plan["notes"] or nothing)
    assert plan["elementwise"]["kernel"] in page.text("#plan-others")


def test_the_picture_has_each_layer_as_wide_as_its_bytes(page, plan):
    drawn = page.run(
        "[...document.querySelectorAll('#picture .layer')].map((e) => [e.dataset.prefix, "
        "e.getBoundingClientRect().width, "
        "getComputedStyle(e).backgroundColor, e.parentElement.classList[0], e.parentElement.classList.contains('cut')])"
    )
    assert {prefix for prefix, *_ in drawn} == {layer["prefix"] for layer in plan["layers"]}
    by_prefix = {layer["prefix"]: layer for layer in plan["layers"]}
    bars = [
        (by_prefix[prefix], width, colour, cut)
        for prefix, width, colour, parent, cut in drawn
        if parent == "bar"
    ]
    assert [layer["prefix"] for layer, *_ in bars] == [
        layer["prefix"] for layer in plan["layers"] if layer["bytes"]
    ]
    # The embedding alone is several blocks large: it would leave nothing to see of them.
    assert [layer["prefix"] for layer, *_, cut in bars if cut] == ["model.embed_tokens"]
    scale = max(width / layer["bytes"] for layer, width, _, cut in bars if not cut)
    for layer, width, _, cut in bars:
        # A bar gives up a pixel to each gap.
        assert cut or abs(width - layer["bytes"] * scale) < 8, layer["prefix"]
        assert not cut or width < layer["bytes"] * scale
    colours = {}
    for layer, _, colour, _ in bars:
        colours.setdefault(layer["method_detail"], set()).add(colour)
    assert all(len(used) == 1 for used in colours.values())
    assert len(set.union(*colours.values())) == len(colours), "each method has a colour of its own"
    legend = page.texts("#legend .legend-name")
    assert set(legend) == {layer["method_detail"] for layer in plan["layers"]}
    page.click("#colour-by button:nth-child(2)")
    assert set(page.texts("#legend .legend-name")) == {layer["kernel"] for layer in plan["layers"]}


def test_a_layer_says_why_by_mouse_and_by_keyboard(page, plan):
    layer = next(one for one in plan["layers"] if one["prefix"] == "model.layers.2.mlp.down_proj")
    page.hover(f"[data-prefix='{layer['prefix']}'].layer")
    page.wait(f"document.querySelector('#layer-details h3').innerText === '{layer['prefix']}'")
    told = page.text("#layer-details")
    assert layer["numerics"] in told and layer["source"] in told and f"{layer['bytes']:,} bytes" in told
    assert layer["refused"]
    for refused in layer["refused"]:
        assert refused["kernel"] in told and refused["why"] in told
    page.run("document.querySelector('#picture [tabindex=\"0\"]').focus()")
    first = page.text("#layer-details h3")
    assert first == plan["layers"][0]["prefix"]
    page.press("ArrowDown")
    page.press("ArrowRight")
    assert page.text("#layer-details h3") == "model.layers.0.self_attn.k_proj"
    assert page.count("#picture [tabindex='0']") == 1
    page.press("Enter")
    page.wait("document.querySelector('.extra h3')?.innerText === 'model.layers.0.self_attn.k_proj'")


def test_the_table_sorts_and_filters(page, plan):
    by_bytes = sorted(plan["layers"], key=lambda layer: -layer["bytes"])
    page.click("#table-head th:nth-child(6) button")
    sizes = page.run("[...document.querySelectorAll('[data-bytes]')].map((e) => Number(e.dataset.bytes))")
    assert sizes == [layer["bytes"] for layer in by_bytes]
    assert page.run("document.querySelector('#table-head th:nth-child(6)').ariaSort") == "descending"
    page.click("#table-head th:nth-child(6) button")
    sizes = page.run("[...document.querySelectorAll('[data-bytes]')].map((e) => Number(e.dataset.bytes))")
    assert sizes == sorted(sizes)
    page.click("#table-head th:nth-child(1) button")
    page.click("#filter")
    page.type("down_proj AWQ")
    expected = [layer["prefix"] for layer in plan["layers"] if "down_proj" in layer["prefix"]]
    assert shown_layers(page) == expected
    assert page.text("#table-count").startswith(f"{len(expected)} of {len(plan['layers'])} layers")
    page.type(" no-such-word")
    assert shown_layers(page) == []


def test_a_plan_with_everything_in_it(browser, script, plan):
    """What the shipped model lacks: rules, states, ranks, ties, routing, graphs, drafts, more methods than colours."""
    base = plan["layers"][1]
    many = [
        {**base, "prefix": f"model.layers.{i}.mlp.x", "method_detail": f"method {i}", "bytes": 1000 + i}
        for i in range(14)
    ]
    other = [
        {**base, "prefix": "lm_head", "kind": "lm_head", "bytes": 0, "tied_to": "model.embed_tokens"},
        {**base, "prefix": "model.layers.0.ssm", "kind": "recurrence", "bytes": 0, "state_bytes": 4096,
         "shape": [2, 8, 8]},
        {**base, "prefix": "model.layers.0.q", "rule": "**.q=int8", "source": "rule", "method": "int8",
         "method_detail": "int8 (from awq)", "source_method": "awq", "fused_with": ["model.layers.0.k"],
         "refused": [{"kernel": "triton", "why": "needs bf16", "cause": "setting", "fix": "dtype=bfloat16"}]},
    ]  # fmt: skip
    script.plan = {
        **plan,
        "layers": many + other,
        "definition": "transformers' SmolLM3ForCausalLM",
        "totals": {**plan["totals"], "state_bytes_per_request": 4096},
        "kv_cache": {},
        "rules": [{"rule": "**.q=int8", "matches": 3, "decides": 1, "shadowed_by": ["lm_head=none"]}],
        "routing": [{"kernel": "native", "refused": [], "prefixes": ["a", "b"]}],
        "decoding_graph": {"captured": False, "why_not": "a hook"},
        "strategy": {"name": "prompt_lookup", "settings": {"tokens": 4}, "sources": {"tokens": "default"}},
        "notes": [],
        "sampling": {},
    }
    with browser.page(f"{script.url}/#plan") as page:
        page.wait(LAYERS)
        assert shown_layers(page) == [layer["prefix"] for layer in script.plan["layers"]]
        assert page.count("#legend li") == 16
        text = page.run("document.querySelector('#plan').innerText")
        for part in ("SmolLM3ForCausalLM", "matches 3 layers and decides 1", "lm_head=none", "Routing of 2 routers",
                     "a hook", "prompt_lookup", "tokens 4 (default)", "4.10 kB", "shared"):  # fmt: skip
            assert part in text, part
        page.hover("[data-prefix='model.layers.0.q'].layer")
        page.wait("document.querySelector('#layer-details h3').innerText === 'model.layers.0.q'")
        told = page.text("#layer-details")
        assert (
            "your rule **.q=int8" in told
            and "with dtype=bfloat16" in told
            and "from awq" in told
            and "model.layers.0.k" in told
        )
        assert page.complaints == []


def test_without_a_plan_the_page_says_so(browser, script):
    with browser.page(f"{script.url}/#plan") as page:
        page.wait("document.querySelector('#plan-error').checkVisibility()")
        assert "could not be read" in page.text("#plan-error")
