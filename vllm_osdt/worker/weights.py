"""Counts the updates of a rank's weights, whichever of vLLM's interfaces they come through.

The engine core asks after each of a caller's RPCs, and every step's report says it (``messages.HeldWeights``): keys,
values and profiles of other weights are then used no more.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from vllm_osdt.messages import HeldWeights


class WeightWatch:
    """How often a model's weights have changed since it was loaded, and from which files they are.

    Changes between two looks are one update: a trainer may load tensor by tensor.

    Args:
        model: A canvas model, which counts its loads (``CanvasMixin.num_loads``).
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._num_loads: int = model.num_loads
        self._is_changed = False
        self._checkpoint: tuple[str, str | None] | None = None
        self.last = HeldWeights()

    def change(self) -> None:
        """The weights have changed, perhaps without a load."""
        self._is_changed, self._checkpoint = True, None

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """The weights change, be it in part; a step of another thread may look meanwhile."""
        self.change()
        try:
            yield
        finally:
            self.change()

    def replace(self, model: Any) -> None:
        """Another model is served."""
        self._model = model
        self.change()

    def read(self, checkpoint: str, revision: str | None) -> None:
        """All weights have been read from a checkpoint's files."""
        self._is_changed, self._checkpoint, self._num_loads = True, (checkpoint, revision), self._model.num_loads

    def look(self) -> HeldWeights:
        """The weights now; what has changed since the last look is one update."""
        if self._model.num_loads != self._num_loads:
            self.change()
            self._num_loads = self._model.num_loads
        if self._is_changed:
            self._is_changed = False
            self.last = HeldWeights(self.last.num_updates + 1, self._checkpoint)
        return self.last


class WatchedRunnerMixin:
    """What of a runner's interface changes weights. Whatever calls the model's ``load_weights`` is counted there."""

    model: Any
    vllm_config: Any
    weights: WeightWatch | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM does, and watch for other weights."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        if self.weights is None:
            self.weights = WeightWatch(self.model)
        else:
            self.weights.replace(self.model)

    def reload_weights(self, weights_iterator: Any = None, *args: Any, **kwargs: Any) -> None:
        """As vLLM does: the caller's weights, or those of a checkpoint's files."""
        assert self.weights is not None
        with self.weights.changing():  # weights in the format of kernels are not loaded, but copied
            super().reload_weights(weights_iterator, *args, **kwargs)  # type: ignore[misc]
        if weights_iterator is None:
            model = self.vllm_config.model_config
            self.weights.read(model.model, model.revision)

    def held_weights(self) -> HeldWeights:
        """The weights that the next step has."""
        return HeldWeights() if self.weights is None else self.weights.look()


class WatchedWorkerMixin:
    """What of a worker's interface changes weights, beside its runner's."""

    model_runner: Any
    _weight_update_active: bool  # vLLM's: between start_weight_update and finish_weight_update

    def held_weights(self) -> HeldWeights:
        """The weights now; an update that is under way does not count yet, unless a step runs."""
        watch: WeightWatch = self.model_runner.weights
        return watch.last if self._weight_update_active else watch.look()

    def weights_changed(self) -> None:
        """For a caller that writes to parameters: the weights are others now."""
        self.model_runner.weights.change()

    def update_weights(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM does; some of its backends write to parameters."""
        with self.model_runner.weights.changing():
            super().update_weights(*args, **kwargs)  # type: ignore[misc]

    def finish_weight_update(self) -> None:
        """As vLLM does; the weights may be in place only now."""
        with self.model_runner.weights.changing():
            super().finish_weight_update()  # type: ignore[misc]

    def reset_weights(self) -> None:
        """As vLLM does: all are 0."""
        with self.model_runner.weights.changing():
            super().reset_weights()  # type: ignore[misc]

    def sleep(self, level: int = 1) -> None:
        """As vLLM does; level 2 forgets the weights."""
        if level >= 2:
            self.weights_changed()
        super().sleep(level)  # type: ignore[misc]

    def add_lora(self, lora_request: Any) -> bool:
        """As vLLM does; an adapter that takes the place of one of its name computes something else."""
        if lora_request.load_inplace and lora_request.lora_int_id in self.list_loras():  # type: ignore[attr-defined]
            self.weights_changed()
        return super().add_lora(lora_request)  # type: ignore[misc]
