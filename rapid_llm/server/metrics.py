"""Metrics for Prometheus, at ``/metrics``."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rapid_llm.stats import Stats

if TYPE_CHECKING:
    from rapid_llm.decoder import RapidDecoder
    from rapid_llm.server.admission import Admission

_PREFIX = "rapid_llm"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts of one server, in a registry of their own.

    Args:
        decoder: the models, whose kept KV is told.
        admission: the queue.
    """

    def __init__(self, decoder: RapidDecoder, admission: Admission) -> None:
        self.registry = CollectorRegistry()
        self._lock = Lock()
        self._requests = self._counter("requests", "Requests by path and status", "path", "status")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts that were answered")
        self._cached = self._counter(
            "cached_tokens", "Tokens of prompts whose KV was kept, by where it was", "tier"
        )
        self._completion = self._counter("completion_tokens", "Generated tokens")
        self._drafted = self._counter("drafted_tokens", "Proposed tokens")
        self._accepted = self._counter("accepted_tokens", "Proposed tokens that were accepted")
        self._rounds = self._counter("rounds", "Verification passes of the target")
        self._prefill = self._counter("prefill_seconds", "Seconds of reading prompts")
        self._decode = self._counter("decode_seconds", "Seconds of generating")
        self._cancelled = self._counter("cancelled_requests", "Requests whose client went away")
        self._first = Histogram(
            "time_to_first_token_seconds",
            "Seconds from a request's turn to its first tokens",
            namespace=_PREFIX,
            registry=self.registry,
            buckets=_SECONDS,
        )
        self._total = Stats()
        self._gauge("acceptance_ratio", "Accepted by proposed tokens").set_function(
            lambda: self._total.acceptance_ratio
        )
        self._gauge("tokens_per_round", "Generated tokens by verification passes").set_function(
            lambda: self._total.tokens_per_round
        )
        self._gauge("requests_running", "Requests that run").set_function(lambda: admission.active)
        self._gauge("requests_waiting", "Requests that wait").set_function(lambda: admission.queued)
        kept = self._gauge("kv_bytes", "Bytes of the KV of prompts that is kept", "tier")
        kept.labels("device").set_function(lambda: decoder.memory.kept_kv)
        kept.labels("host").set_function(lambda: decoder.memory.kept_kv_host)
        kept.labels("disk").set_function(lambda: decoder.memory.kept_kv_disk)

    def text(self) -> bytes:
        """All values in Prometheus' format."""
        return generate_latest(self.registry)

    def answered(self, path: str, status: int) -> None:
        """Count a request."""
        self._requests.labels(path, str(status)).inc()

    def cancelled(self) -> None:
        """Count a request whose client went away."""
        self._cancelled.inc()

    def generated(self, stats: Stats) -> None:
        """Count what a generation did, also one that was stopped."""
        with self._lock:
            self._total = Stats.together([self._total, stats])
        self._prompt.inc(stats.prompt_tokens)
        self._cached.labels("device").inc(stats.cached_tokens_device)
        self._cached.labels("host").inc(stats.cached_tokens_host)
        self._cached.labels("disk").inc(stats.cached_tokens_disk)
        self._completion.inc(stats.completion_tokens)
        self._drafted.inc(stats.drafted_tokens)
        self._accepted.inc(stats.accepted_tokens)
        self._rounds.inc(stats.rounds)
        self._prefill.inc(stats.prefill_seconds)
        self._decode.inc(stats.decode_seconds)
        if stats.time_to_first_token is not None:
            self._first.observe(stats.time_to_first_token)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(name, help, labels, namespace=_PREFIX, registry=self.registry)

    def _gauge(self, name: str, help: str, *labels: str) -> Gauge:
        return Gauge(name, help, labels, namespace=_PREFIX, registry=self.registry)
