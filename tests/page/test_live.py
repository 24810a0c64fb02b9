"""The live figures: read from /metrics in Prometheus' text format, and absent where that is."""

from __future__ import annotations

import json

from tests.page.scripted import said

METRICS = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a \\"b\\" {c}, \\\\ d"} 3.0
vllm:num_requests_running{engine="1",model_name="x"} 1.0
vllm:num_requests_waiting 2
vllm:kv_cache_usage_perc{model_name="x"} 0.25
vllm:generation_tokens_total{model_name="x"} 1.2e+03
odd line that is none
vllm:e2e_request_latency_seconds_bucket{le="+Inf"} 7 1700000000000
"""
PULSE = "document.querySelectorAll('#pulse span[data-live]').length"


def test_the_text_format_is_read(browser, script):
    with browser.page(script.url) as page:
        samples = page.run(
            f"import('/page/metrics.js').then(({{ parseMetrics }}) => parseMetrics({json.dumps(METRICS)}))"
        )
    assert samples[0] == {
        "name": "vllm:num_requests_running",
        "labels": {"engine": "0", "model_name": 'a "b" {c}, \\ d'},
        "value": 3,
    }
    assert [sample["value"] for sample in samples] == [3, 1, 2, 0.25, 1200, 7]


def test_queue_cache_and_speed_are_shown(browser, script):
    script.metrics = METRICS
    with browser.page(f"{script.url}/#live") as page:
        page.wait(PULSE)
        assert page.text("[data-live=running]") == "Running 4"
        assert page.text("[data-live=waiting]") == "Waiting 2"
        assert page.text("[data-live=cache]") == "KV cache 25 %"
        # Speed is known from the second reading on.
        script.metrics = METRICS.replace("1.2e+03", "1300")
        page.wait("document.querySelector('[data-live=speed]')")
        assert (
            float(page.text("[data-live=speed]").removeprefix("Speed ").removesuffix(" /s").replace(",", ""))
            >= 0
        )
        assert page.text("[data-tile=running] .value") == "4"
        assert page.count("[data-tile] svg polyline") >= 3
        # A server that restarts counts from 0 again.
        script.metrics = METRICS.replace("1.2e+03", "5")
        read = script.read
        page.wait("true")
        while script.read < read + 2:
            page.wait("true")
        assert "-" not in page.text("#pulse")
        assert page.complaints == []


def test_without_figures_there_is_nothing(browser, script):
    script.answers = [said("Hello.")]
    with browser.page(f"{script.url}/#live") as page:
        page.wait("document.querySelector('#no-metrics').checkVisibility()")
        assert page.text("#pulse") == "" and page.count("#tiles > *") == 0
        read = script.read
        page.click("#chat-link")
        page.click("#input")
        page.type("x")
        page.press("Enter")
        page.wait("document.querySelector('.answer')?.dataset.state === 'done'")
        assert script.read == read, "who has none is not asked again"
        page.click("#live-link")
        assert page.text("[data-figure=tokens] dd") == "7" and page.text("[data-figure=cached] dd") == "32"
        assert page.complaints == []


def test_a_page_that_nobody_sees_does_not_ask(browser, script):
    script.metrics = METRICS
    with browser.page(script.url) as page:
        page.wait(PULSE)
        page.run(
            "Object.defineProperty(document, 'hidden', { get: () => window.away, configurable: true }); "
            "window.away = true; document.dispatchEvent(new Event('visibilitychange'))"
        )
        read = script.read
        # Timers that were set would have fired before this one, which is longer.
        page.run("new Promise((done) => setTimeout(done, 2500))")
        assert script.read <= read + 1
        page.run("window.away = false; document.dispatchEvent(new Event('visibilitychange'))")
        now = script.read
        while script.read == now:
            page.wait("true")
