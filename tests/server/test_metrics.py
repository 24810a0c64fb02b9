"""/metrics as Prometheus reads it: vLLM's names, the engine's own numbers, labels of a fixed set."""

from __future__ import annotations

import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pymllm.asynchronous.tally import Histogram
from pymllm.server.traffic import REASONS
from tests.server.by_hand import LONG, get, held_steps, post, send, wait_until
from tests.server.conftest import MODEL, serve

BODY = {"prompt": "import os\n", "max_tokens": 20, "temperature": 0, "logit_bias": {"0": -100, "2": -100}}


def read(served, **headers):
    """All samples: {(name, the labels but those of the model): value}."""
    status, body, answered = get(served, "/metrics", headers=headers)
    assert status == 200 and answered["Content-Type"].startswith("text/plain; version=")
    found = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            if sample.name.startswith("vllm:"):
                assert (labels.pop("model_name"), labels.pop("engine")) == (MODEL, "0")
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


def value(found, name, **labels):
    return found[name, tuple(sorted(labels.items()))]


# What routers and dashboards of vLLM ask for.
NAMES = """
vllm:num_requests_running vllm:num_requests_waiting vllm:kv_cache_usage_perc vllm:prefix_cache_queries_total
vllm:prefix_cache_hits_total vllm:prompt_tokens_total vllm:generation_tokens_total vllm:num_preemptions_total
vllm:time_to_first_token_seconds_sum vllm:inter_token_latency_seconds_sum vllm:e2e_request_latency_seconds_count
vllm:request_time_per_output_token_seconds_count vllm:request_queue_time_seconds_sum
vllm:request_prefill_time_seconds_sum vllm:request_decode_time_seconds_sum vllm:spec_decode_num_drafts_total
vllm:spec_decode_num_draft_tokens_total vllm:spec_decode_num_accepted_tokens_total
"""


def test_the_numbers_are_those_of_the_requests(llm):
    prompt = len(llm.tokenizer.encode(BODY["prompt"] * 20))
    with serve(llm) as served:
        before = read(served)
        for name in NAMES.split():
            assert value(before, name) == 0, name
        body = {**BODY, "prompt": BODY["prompt"] * 20}
        usage = [post(served, body)[1]["usage"] for _ in range(2)]
        post(served, {"prompt": "x", "max_tokens": 0, "echo": True, "logprobs": 1})
        assert post(served, {"prompt": "x", "max_tokens": -1})[0] == 400
        found = read(served)
        cached = sum(one["prompt_tokens_details"]["cached_tokens"] for one in usage)
        assert cached > 0 and {one["prompt_tokens"] for one in usage} == {prompt}
        scored = len(llm.tokenizer.encode("x"))
        assert value(found, "vllm:prompt_tokens_total") == 2 * prompt + scored
        assert value(found, "vllm:generation_tokens_total") == 40
        assert value(found, "vllm:prefix_cache_queries_total") == 2 * prompt + scored
        assert value(found, "vllm:prefix_cache_hits_total") == cached
        assert value(found, "vllm:request_success_total", finished_reason="length") == 3
        for reason in ("stop", "abort", "error"):
            assert value(found, "vllm:request_success_total", finished_reason=reason) == 0
        assert value(found, "vllm:time_to_first_token_seconds_count") == 2
        assert value(found, "vllm:inter_token_latency_seconds_count") == 2 * 19
        assert value(found, "vllm:e2e_request_latency_seconds_count") == 3
        first, rest = (
            value(found, f"vllm:{name}_sum")
            for name in ("time_to_first_token_seconds", "inter_token_latency_seconds")
        )
        whole = value(found, "vllm:e2e_request_latency_seconds_sum")
        assert 0 < first < whole and 0 < rest < whole
        assert value(found, "vllm:request_generation_tokens_bucket", le="20.0") == 3
        assert value(found, "vllm:request_generation_tokens_bucket", le="10.0") == 1
        cache = llm.engine.cache
        labels = {"block_size": "16", "num_gpu_blocks": str(cache.num_pages), "enable_prefix_caching": "True"}
        assert value(found, "vllm:cache_config_info", **labels) == 1
        ended = {"method": "POST", "path": "/v1/completions"}
        assert value(found, "pymllm:http_requests_total", **ended, status="200") == 3
        assert value(found, "pymllm:http_requests_total", **ended, status="400") == 1
        assert value(found, "pymllm:refusals_total", reason="bad_request") == 1
        assert value(found, "process_resident_memory_bytes") > 10**7


def test_what_runs_waits_and_holds_pages_is_told_while_it_does(llm):
    with serve(llm, max_running=1) as served, held_steps(llm) as gate:
        first, second = send(served, LONG), send(served, LONG)
        wait_until(lambda: value(read(served), "pymllm:places_taken") == 2)
        gate.let(2)
        wait_until(lambda: gate.begun == 3)
        found = read(served)
        assert value(found, "vllm:num_requests_running") == value(found, "vllm:num_requests_waiting") == 1
        pages = llm.engine.cache.num_pages
        assert value(found, "vllm:kv_cache_usage_perc") == pytest.approx(1 / pages)
        assert value(found, "pymllm:requests_under_way") == 2 and value(found, "pymllm:healthy") == 1
        first.close()
        second.close()
        wait_until(lambda: served.app.state.traffic.under_way == 0)
        gate.let(math.inf)
        wait_until(lambda: value(read(served), "pymllm:places_taken") == 0)
        found = read(served)
        assert value(found, "vllm:kv_cache_usage_perc") == value(found, "vllm:num_requests_waiting") == 0
        assert value(found, "vllm:request_success_total", finished_reason="abort") == 2
        ended = {"method": "POST", "path": "/v1/completions", "status": "499"}
        assert value(found, "pymllm:http_requests_total", **ended) == 2


def test_no_text_of_a_client_s_becomes_a_label(llm):
    with serve(llm) as served:
        for number in range(5):
            get(served, f"/v1/{number}/x", f"BREW{number}", {"X-Request-Id": f"id{number}"})
            get(served, f"/v1/models/name-{number}")
            post(served, {"model": f"model-{number}", "prompt": "x"})
        found = read(served)
        labels = {pair for name, pairs in found for pair in pairs if name.startswith("pymllm:http")}
        assert {item for name, item in labels if name == "path"} == {
            *("/v1/completions", "/v1/models/{name:path}", "other"),
        }
        assert {item for name, item in labels if name == "method"} == {"GET", "POST", "other"}
        reasons = {dict(pairs)["reason"] for name, pairs in found if name == "pymllm:refusals_total"}
        assert reasons == set(REASONS)


def test_metrics_are_behind_the_key_unless_they_are_opened_and_each_app_has_its_own(llm):
    with serve(llm, api_key="secret") as closed, serve(llm, api_key="secret", open_metrics=True) as opened:
        assert get(closed, "/metrics")[0] == 401
        key = {"Authorization": "Bearer secret"}
        post(opened, BODY, headers=key)
        assert value(read(opened), "vllm:generation_tokens_total") == 20
        assert value(read(closed, **key), "vllm:generation_tokens_total") == 0
        assert get(opened, "/v1/models")[0] == 401
        # OpenMetrics, for those who ask for it.
        accepts = {"Accept": "application/openmetrics-text; version=1.0.0"}
        status, body, headers = get(opened, "/metrics", headers=accepts)
        assert headers["Content-Type"].startswith("application/openmetrics-text")
        assert status == 200 and body.endswith(b"# EOF\n")


def test_a_histogram_counts_what_is_at_most_a_bound():
    histogram = Histogram((1.0, 2.0, 5.0))
    for number in (0.5, 1.0, 1.5, 5.0, 7.0):
        histogram.observe(number)
    assert histogram.upto == [2, 3, 4, 5] and histogram.sum == 15.0
