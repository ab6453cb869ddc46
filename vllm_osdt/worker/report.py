"""What workers tell the scheduler: how requests are decoded, and what happened to profiles."""

from collections import Counter, OrderedDict
from typing import Any

MAX_TASKS_REMEMBERED = 1024


class Report:
    """Collects news between two engine steps; plain values, since they cross processes.

    Attributes:
        counts: Events by (metric, label).
        requests: By request id: ``policy``, ``task``, ``profile`` (id, None while there is none), ``calibrating``.
        thresholds: Mean threshold in force, by task.
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.requests: dict[str, dict[str, Any]] = {}
        self.thresholds: dict[str, float] = {}
        self._profile_of: OrderedDict[str, str] = OrderedDict()

    def uses(self, task: str, profile_id: str, threshold: float) -> None:
        """A request of the task is decoded with a profile; told once per profile."""
        if self._profile_of.get(task) == profile_id:
            return
        self._profile_of[task] = profile_id
        self._profile_of.move_to_end(task)
        if len(self._profile_of) > MAX_TASKS_REMEMBERED:
            self._profile_of.popitem(last=False)
        self.thresholds[task] = threshold

    def take(self) -> dict[str, Any] | None:
        """The news since the last call, None when there are none."""
        if not (self.counts or self.requests or self.thresholds):
            return None
        counts = [[metric, label, number] for (metric, label), number in self.counts.items()]
        news = {"counts": counts, "requests": self.requests, "thresholds": self.thresholds}
        self.counts, self.requests, self.thresholds = Counter(), {}, {}
        return news
