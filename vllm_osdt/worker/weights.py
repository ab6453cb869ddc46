"""Counts the updates of a rank's weights, whichever of vLLM's interfaces they come through.

The engine core asks for the number after each of a caller's RPCs, and every step's report has it
(``StepReport.num_weight_updates``): keys, values and profiles of other weights are then used no more.
"""

from typing import Any


class WeightWatch:
    """How often a model's weights have changed since it was loaded.

    Changes that no one has asked about are one update: a trainer may load tensor by tensor.

    Args:
        model: A canvas model, which counts its loads (``CanvasMixin.num_loads``).
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._num_loads: int = model.num_loads
        self._is_changed = False
        self.num_updates = 0

    def replace(self, model: Any) -> None:
        """Another model is served."""
        self._model = model
        self._is_changed = True

    def change(self) -> None:
        """The weights have changed without a load."""
        self._is_changed = True

    def settle(self) -> int:
        """The number of updates; what has changed since the last call is one."""
        if self._is_changed or self._model.num_loads != self._num_loads:
            self.num_updates += 1
            self._is_changed, self._num_loads = False, self._model.num_loads
        return self.num_updates


class WeightUpdatesMixin:
    """What of a worker's interface changes weights.

    Whatever calls the model's ``load_weights`` is counted there: vLLM's reload of a checkpoint and methods of a
    framework's own. Here is what writes to parameters.
    """

    model_runner: Any
    _weight_update_active: bool  # vLLM's: between start_weight_update and finish_weight_update

    def num_weight_updates(self) -> int:
        """Updates so far; one that is under way does not count yet, unless a step runs."""
        watch: WeightWatch = self.model_runner.weights
        return watch.num_updates if self._weight_update_active else watch.settle()

    def weights_changed(self) -> None:
        """For a caller that writes to parameters: the weights are others now."""
        self.model_runner.weights.change()

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM does; weights in the kernels' format are not loaded, but copied."""
        self.weights_changed()
        super().reload_weights(*args, **kwargs)  # type: ignore[misc]

    def update_weights(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM does; some of its backends write to parameters."""
        self.weights_changed()
        super().update_weights(*args, **kwargs)  # type: ignore[misc]

    def finish_weight_update(self) -> None:
        """As vLLM does; the weights may be in place only now."""
        self.weights_changed()
        super().finish_weight_update()  # type: ignore[misc]

    def reset_weights(self) -> None:
        """As vLLM does: all are 0."""
        self.weights_changed()
        super().reset_weights()  # type: ignore[misc]

    def sleep(self, level: int = 1) -> None:
        """As vLLM does; level 2 forgets the weights."""
        if level >= 2:
            self.weights_changed()
        super().sleep(level)  # type: ignore[misc]

    def add_lora(self, lora_request: Any) -> bool:
        """As vLLM does; an adapter that replaces one of its name changes what that computes."""
        if lora_request.load_inplace:
            self.weights_changed()
        return super().add_lora(lora_request)  # type: ignore[misc]
