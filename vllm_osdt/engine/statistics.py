"""What the engine core tells of its requests and profiles: counts with vLLM's statistics, and a field of every output.

Counts travel in the entry for the statistics of KV connectors, which these models do not have, a request's own figures
in the entry for their parameters. ``host.compat`` leads both to the front end (``frontend.metrics``).
"""

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_osdt.engine.weights import Weights

if TYPE_CHECKING:
    from vllm.v1.request import Request

MAX_TASKS_REMEMBERED = 1024


class About(NamedTuple):
    """How a request is decoded.

    Attributes:
        policy: Name of its policy.
        task: The task it was found to belong to.
        profile: Id of the calibration profile it uses, None without one.
        calibrating: Whether it is recorded for a profile.
    """

    policy: str | None = None
    task: str | None = None
    profile: str | None = None
    calibrating: bool = False


class EngineStatistics:
    """Collects news between two messages to the front end."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()  # by (metric, label)
        self._thresholds: dict[str, float] = {}
        self._ended: list[tuple[str, int, int]] = []
        self._profile_of: OrderedDict[str, str] = OrderedDict()

    def uses(self, task: str, profile_id: str, threshold: float) -> None:
        """A request of the task is decoded with a profile, whose mean threshold is told once."""
        if self._profile_of.get(task) == profile_id:
            return
        self._profile_of[task] = profile_id
        self._profile_of.move_to_end(task)
        if len(self._profile_of) > MAX_TASKS_REMEMBERED:
            self._profile_of.popitem(last=False)
        self._thresholds[task] = threshold

    def ended(self, about: About, nfe: int, num_tokens: int) -> None:
        """A request has ended well."""
        if about.policy is not None:
            self._ended.append((about.policy, nfe, num_tokens))

    def take(self) -> dict[str, Any]:
        """The news since the last call, as plain values; empty when there are none."""
        if not (self.counts or self._thresholds or self._ended):
            return {}
        counts = [[metric, label, number] for (metric, label), number in self.counts.items()]
        news = {"counts": counts, "thresholds": self._thresholds, "ended": self._ended}
        self.counts, self._thresholds, self._ended = Counter(), {}, []
        return news


def describe(request: "Request", about: About, first: Weights, last: Weights) -> dict[str, Any]:
    """How a request is decoded.

    Args:
        request: vLLM's, which counts its forwards.
        about: What holds for it.
        first, last: The weights that decided its first and its last tokens so far.

    Returns:
        :class:`About`, ``nfe`` (the forward passes it took part in so far), ``tokens_per_forward``,
        ``weights_version`` (of ``last``) and ``weights_version_at_start`` (of ``first``).
    """
    nfe = num_forwards(request)
    return {
        **about._asdict(),
        "nfe": nfe,
        "tokens_per_forward": request.num_output_tokens / nfe if nfe else 0.0,
        "weights_version": last.version,
        "weights_version_at_start": first.version,
    }


def num_forwards(request: Any) -> int:
    """Forward passes that a request took part in (NFE); a prompt-only one is never among them.

    Args:
        request: vLLM's ``Request``, or the ``CompletionOutput`` made of it.
    """
    return sum(request.spec_decode_metrics.histogram) if request.spec_decode_metrics is not None else 0
