"""What `GET /metrics` tells, in Prometheus's form."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

__all__ = ["Gauges", "Metrics", "ToldTokens"]

Gauges = dict[str, tuple[str, float | Mapping[str, float]]]
"""Name → what it says, and its value, or one for each model."""

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters of one server.

    Attributes:
        requests: by path and status.
        first_token: histogram of seconds from a request's arrival, with all that it waited for.
        model_wait: histogram of those of them for which it waited for its model, of requests that did.
        prompt_tokens, cached_tokens, aborted: counters.
        told: tokens of replies, and the seconds between them.
    """

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("mlxqwen_requests", "HTTP requests", ["path", "status"], registry=registry)
        self.first_token = Histogram(
            "mlxqwen_first_token_seconds",
            "Seconds from a request's arrival to its reply's first token, waits for its model included",
            buckets=_FIRST,
            registry=registry,
        )
        self.model_wait = Histogram(
            "mlxqwen_model_wait_seconds",
            "Seconds that a request waited for its model to be loaded, or for memory beside it",
            buckets=_FIRST,
            registry=registry,
        )
        self.prompt_tokens = Counter("mlxqwen_prompt_tokens", "Tokens of prompts", registry=registry)
        self.cached_tokens = Counter(
            "mlxqwen_cached_tokens", "Tokens of prompts that were known and not read", registry=registry
        )
        self.told = ToldTokens(_BETWEEN)
        registry.register(self.told)
        self.aborted = Counter(
            "mlxqwen_aborted_replies", "Replies that ended early: clients gone, deadlines, errors", registry=registry
        )

    def watch(self, gauges: Callable[[], Gauges]) -> None:
        """Add gauges that are looked at when they are asked for."""
        self._registry.register(_Gauges(gauges))

    def read(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Count a prompt that was read."""
        self.prompt_tokens.inc(prompt_tokens)
        self.cached_tokens.inc(cached_tokens)

    def page(self) -> bytes:
        """The text of the page."""
        return generate_latest(self._registry)


class ToldTokens(Collector):
    """Counts tokens of replies and the seconds between them, in plain numbers: it is told of every single token.

    Args:
        bounds: upper bounds of the histogram's buckets, in seconds, ascending.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._tokens = 0
        self._seconds = 0.0
        self._buckets = [0] * (len(bounds) + 1)

    def note(self, seconds: float | None) -> None:
        """Count a token that came `seconds` after the one before it; None for the first of a reply."""
        self._tokens += 1
        if seconds is not None:
            self._seconds += seconds
            self._buckets[bisect_left(self._bounds, seconds)] += 1

    def collect(self) -> Iterator[Metric]:
        """What has been counted, as the registry asks for it."""
        yield CounterMetricFamily("mlxqwen_generated_tokens", "Tokens of replies", value=self._tokens)
        counts = list(accumulate(self._buckets))
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        yield HistogramMetricFamily(
            "mlxqwen_between_tokens_seconds",
            "Seconds between tokens of a reply",
            buckets=list(zip(names, counts, strict=True)),
            sum_value=self._seconds,
        )


class _Gauges(Collector):
    def __init__(self, gauges: Callable[[], Gauges]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        for name, (text, value) in self._gauges().items():
            if not isinstance(value, Mapping):
                yield GaugeMetricFamily(f"mlxqwen_{name}", text, value=value)
                continue
            family = GaugeMetricFamily(f"mlxqwen_{name}", text, labels=["model"])
            for model, one in value.items():
                family.add_metric([model], one)
            yield family
