"""The numbers of one app as Prometheus reads them, under vLLM's names where vLLM has the same ones.

Nothing is kept here: the engine, the worker's `Tally` and the `Traffic` hold the numbers, and each scrape reads them.
Labels have values of a fixed set, or of what the operator chose: names of the model and of adapters.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from pymllm.asynchronous.tally import Histogram
from pymllm.engine.request import Request
from pymllm.server.service import Service
from pymllm.server.traffic import Traffic

# vLLM numbers its engines; a server here has one.
ENGINE = "0"


class Exposition:
    """The metrics of one app, in a registry of its own."""

    def __init__(self, service: Service, traffic: Traffic) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(ModelMetrics(service))
        self.registry.register(TrafficMetrics(traffic))
        ProcessCollector(registry=self.registry)

    def write(self, accept: str) -> tuple[bytes, str]:
        """Return the text of all metrics, and its media type.  accept: the media types that the client reads."""
        encode, media_type = choose_encoder(accept)
        return encode(self.registry), media_type


class ModelMetrics(Collector):
    """The numbers of the model: what it does and has done."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._labels = {"model_name": service.model_name, "engine": ENGINE}

    def collect(self) -> Iterator[Metric]:
        tally = self.service.worker.tally
        if self.service.llm.generates:
            yield from self._engine()
        for name, words, count in (
            ("prompt_tokens", "Tokens of prompts, those that were cached included.", tally.prompt_tokens),
            ("generation_tokens", "Tokens of answers.", tally.generated_tokens),
            ("prefix_cache_queries", "Tokens that the prefix cache was asked for.", tally.prompt_tokens),
            ("prefix_cache_hits", "Tokens that the prefix cache had.", tally.cached_tokens),
            (
                "num_preemptions",
                "How often a request lost its pages, of requests that ended.",
                tally.preemptions,
            ),
            ("spec_decode_num_drafts", "Steps of requests whose tokens were drafted.", tally.drafts),
            ("spec_decode_num_draft_tokens", "Tokens that were drafted.", tally.drafted_tokens),
            ("spec_decode_num_accepted_tokens", "Drafted tokens that were kept.", tally.accepted_tokens),
        ):
            yield self._counter(f"vllm:{name}", words, [({}, count)])
        finished = [({"finished_reason": reason}, count) for reason, count in tally.finished.items()]
        yield self._counter("vllm:request_success", "Requests that ended, by how they did.", finished)
        for name, words, histogram in (
            (
                "time_to_first_token_seconds",
                "From a request's arrival to its first token.",
                tally.first_token,
            ),
            ("inter_token_latency_seconds", "Between two tokens of an answer.", tally.between_tokens),
            (
                "request_time_per_output_token_seconds",
                "Of each token after the first, a request.",
                tally.a_token,
            ),
            ("e2e_request_latency_seconds", "From a request's arrival to its last token.", tally.whole),
            ("request_queue_time_seconds", "From a request's arrival to its admission.", tally.queued),
            ("request_prefill_time_seconds", "From its admission to its first token.", tally.prefill),
            ("request_decode_time_seconds", "From its first token to its last.", tally.decode),
            ("request_prompt_tokens", "Tokens of a prompt.", tally.prompt_lengths),
            ("request_generation_tokens", "Tokens of an answer.", tally.answer_lengths),
            ("iteration_tokens_total", "Tokens that a step ran.", tally.step_tokens),
        ):
            yield self._histogram(f"vllm:{name}", words, histogram)
        yield self._histogram("pymllm:step_seconds", "Seconds of a step.", tally.step_seconds)

    def _engine(self) -> Iterator[Metric]:
        engine, worker = self.service.llm.engine, self.service.worker
        scheduler, cache = engine.scheduler, engine.cache
        # Copies: the model's thread changes them meanwhile.
        running, waiting = list(scheduler.running), list(scheduler.waiting)
        usage = 1 - cache.available / max(cache.num_pages, 1)
        for name, words, value in (
            ("num_requests_running", "Requests that have been admitted.", len(running)),
            ("num_requests_waiting", "Requests that wait to be.", len(waiting) + worker.waiting),
            ("kv_cache_usage_perc", "Share of the KV cache's pages that requests hold, 0 to 1.", usage),
        ):
            yield self._gauge(f"vllm:{name}", words, {}, value)
        cache_labels = {
            "block_size": str(cache.page_size),
            "num_gpu_blocks": str(cache.num_pages),
            "enable_prefix_caching": str(engine.prefix_reuse),
        }
        yield self._gauge("vllm:cache_config_info", "The KV cache's settings.", cache_labels, 1)
        lora_labels = {
            "max_lora": str(len(self.service.llm.adapters)),
            "running_lora_adapters": _adapters(running),
            "waiting_lora_adapters": _adapters(waiting),
        }
        words = "LoRA adapters that requests use; the value is the time."
        yield self._gauge("vllm:lora_requests_info", words, lora_labels, time.time())

    def _gauge(self, name: str, words: str, labels: Mapping[str, str], value: float) -> Metric:
        everything = {**self._labels, **labels}
        family = GaugeMetricFamily(name, words, labels=list(everything))
        family.add_metric(list(everything.values()), value)
        return family

    def _counter(self, name: str, words: str, counts: Iterable[tuple[Mapping[str, str], int]]) -> Metric:
        family: CounterMetricFamily | None = None
        for labels, count in counts:
            everything = {**self._labels, **labels}
            family = family or CounterMetricFamily(name, words, labels=list(everything))
            family.add_metric(list(everything.values()), count)
        assert family is not None
        return family

    def _histogram(self, name: str, words: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(name, words, labels=list(self._labels))
        bounds = [*(f"{float(bound)}" for bound in histogram.bounds), "+Inf"]
        # The sum first: what comes meanwhile may be in the counts, and is in the next scrape's sum.
        total = histogram.sum
        family.add_metric(
            list(self._labels.values()), list(zip(bounds, histogram.upto, strict=True)), sum_value=total
        )
        return family


class TrafficMetrics(Collector):
    """The numbers of clients: what they have asked, and what was refused."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def collect(self) -> Iterator[Metric]:
        traffic = self.traffic
        answered = CounterMetricFamily(
            "pymllm:http_requests",
            "HTTP requests that ended; 499 is a client that left.",
            labels=["method", "path", "status"],
        )
        for (method, path, status), count in traffic.answered.items():
            answered.add_metric([method, path, str(status)], count)
        yield answered
        refused = CounterMetricFamily(
            "pymllm:refusals", "Requests and connections that were refused, by reason.", labels=["reason"]
        )
        for reason, count in traffic.refused.items():
            refused.add_metric([reason], count)
        yield refused
        places = traffic.worker.places
        for name, words, value in (
            ("connections", "Connections that are open.", traffic.connections),
            ("requests_under_way", "HTTP requests that are being answered.", traffic.under_way),
            ("places_taken", "Prompts that have a place in the line.", places.capacity - places.free),
            ("places", "Prompts that there is room for in the line.", places.capacity),
            ("healthy", "Whether /health is well: 1 or 0.", traffic.why_not_healthy() is None),
        ):
            yield GaugeMetricFamily(f"pymllm:{name}", words, value=float(value))


def _adapters(requests: Iterable[Request]) -> str:
    return ",".join(sorted({request.adapter for request in requests if request.adapter is not None}))
