"""A rank's weight updates are counted whichever interface they come through."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_osdt.messages import HeldWeights
from vllm_osdt.models.canvas_mixin import CanvasMixin
from vllm_osdt.worker.weights import WatchedRunnerMixin, WatchedWorkerMixin, WeightWatch


class HostRunner:
    """What vLLM's runner does with weights."""

    def load_model(self) -> None:
        self.model = SimpleNamespace(num_loads=1)

    def reload_weights(self, weights_iterator: Any = None, weights_path: str | None = None) -> None:
        self.model.num_loads += 1
        if weights_path is not None:
            model = self.vllm_config.model_config
            model.model, model.revision = weights_path, None


class Runner(WatchedRunnerMixin, HostRunner):
    vllm_config = SimpleNamespace()

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(model="org/model", revision="main"))
        self.load_model()


class HostWorker:
    """What vLLM's worker does with weights; its backend of weight transfer writes to parameters."""

    def __init__(self) -> None:
        self.model_runner = Runner()
        self._weight_update_active = False

    def start_weight_update(self) -> None:
        self._weight_update_active = True

    def update_weights(self, update_info: dict) -> None:
        if update_info["fails"]:
            self._weight_update_active = False
            raise RuntimeError

    def finish_weight_update(self) -> None:
        self._weight_update_active = False

    def reset_weights(self) -> None:
        pass

    def sleep(self, level: int = 1) -> None:
        pass

    def list_loras(self) -> set[int]:
        return {1}

    def add_lora(self, lora_request: Any) -> bool:
        return True


class Worker(WatchedWorkerMixin, HostWorker):
    pass


@pytest.fixture
def worker():
    return Worker()


def count(worker):
    """Updates since the last look."""
    before = worker.model_runner.weights.last.num_updates
    return worker.held_weights().num_updates - before


def test_the_weights_of_the_start_are_no_update(worker):
    assert worker.held_weights() == worker.model_runner.held_weights() == HeldWeights(0, None)


@pytest.mark.parametrize(
    ("change", "number"),
    [
        (lambda worker: worker.weights_changed(), 1),
        (lambda worker: worker.reset_weights(), 1),
        (lambda worker: worker.sleep(2), 1),
        (lambda worker: worker.sleep(), 0),
        (lambda worker: worker.add_lora(SimpleNamespace(load_inplace=True, lora_int_id=1)), 1),
        (lambda worker: worker.add_lora(SimpleNamespace(load_inplace=True, lora_int_id=2)), 0),
        (lambda worker: worker.add_lora(SimpleNamespace(load_inplace=False, lora_int_id=1)), 0),
        (lambda worker: worker.model_runner.load_model(), 1),
        (lambda worker: worker.model_runner.reload_weights([("a", 1)]), 1),
        (lambda worker: worker.model_runner.reload_weights(), 1),
        (lambda worker: (worker.sleep(2), worker.model_runner.reload_weights()), 1),
    ],
)
def test_what_changes_weights_counts_once(worker, change, number):
    change(worker)
    assert count(worker) == number
    assert count(worker) == 0


def test_a_load_tensor_by_tensor_is_one_update(worker):
    for _ in range(2):
        for _ in range(5):
            worker.model_runner.model.num_loads += 1
        assert count(worker) == 1


def test_a_transfer_counts_when_it_is_finished(worker):
    worker.start_weight_update()
    for _ in range(3):
        worker.update_weights({"fails": False})
        assert count(worker) == 0
    worker.finish_weight_update()
    assert count(worker) == 1


def test_a_step_within_a_transfer_has_weights_of_its_own(worker):
    worker.start_weight_update()
    worker.update_weights({"fails": False})
    assert worker.model_runner.held_weights().num_updates == 1
    worker.update_weights({"fails": False})
    worker.finish_weight_update()
    assert worker.held_weights().num_updates == 2


def test_a_transfer_that_fails_may_have_changed_weights(worker):
    worker.start_weight_update()
    with pytest.raises(RuntimeError):
        worker.update_weights({"fails": True})
    assert count(worker) == 1


def test_only_weights_that_all_come_from_files_have_a_checkpoint(worker):
    runner = worker.model_runner
    runner.reload_weights()
    assert worker.held_weights().checkpoint == ("org/model", "main")
    runner.reload_weights(weights_path="/trained")
    assert worker.held_weights().checkpoint == ("/trained", None)
    runner.model.num_loads += 1
    assert worker.held_weights() == HeldWeights(3, None)
    runner.reload_weights(weights_path="/trained")
    runner.model.num_loads += 1  # a part of them is replaced before anyone has looked
    assert worker.held_weights() == HeldWeights(4, None)
    runner.reload_weights([("a", 1)])
    assert worker.held_weights().checkpoint is None


class HostModel:
    def load_weights(self, weights: Any) -> set[str]:
        return {name for name, _ in weights}


class Model(CanvasMixin, HostModel):
    pass


def test_a_look_amid_a_load_does_not_hide_its_end():
    model = Model()
    watch, seen = WeightWatch(model), []

    def weights():
        for name in ("a", "b"):
            yield name, None
            seen.append(watch.look().num_updates)  # a step, while another thread loads

    assert model.load_weights(weights()) == {"a", "b"}
    assert seen == [1, 1] and watch.look().num_updates == 2
