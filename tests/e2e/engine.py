"""How the end-to-end tests talk to an engine in their own process."""

from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

_ids = count()


def sampling(max_tokens: int | None = 32, **values: Any) -> SamplingParams:
    """Sampling parameters: greedy without EOS stop unless told, names of :class:`DecodingOptions` go to extra_args."""
    own = {
        name: values.pop(name) for name in list(values) if name in SamplingParams.__struct_fields__ and name != "task"
    }
    return SamplingParams(
        max_tokens=max_tokens,
        **{"temperature": 0.0, "ignore_eos": True, **own},
        extra_args={"osdt_" + name: value for name, value in values.items()},
    )


def case_params(case: dict[str, Any]) -> SamplingParams:
    """Parameters of a recorded case."""
    options = {name: case[name] for name in ("cache", "block_length", "gen_length")}
    if case["threshold"] is None:
        options |= {"policy": "fixed_steps", "steps": case["steps"]}
    else:
        options |= {"policy": "static_threshold", "threshold": case["threshold"]}
    return sampling(case["gen_length"], **options)


def generate(llm: LLM, prompts: Iterable[list[int]], params: Any) -> list[Any]:
    """The first completion of each prompt, with ``token_ids`` and what :func:`nfe` reads."""
    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return [output.outputs[0] for output in llm.generate(requests, params, use_tqdm=False)]


def tokens(completions: Iterable[Any]) -> list[list[int]]:
    """Output tokens of each completion."""
    return [list(completion.token_ids) for completion in completions]


def nfe(completion: Any) -> int:
    """Forward passes that the engine counted for a request."""
    return sum(completion.spec_decode_metrics.histogram)


def scheduler(llm: LLM) -> Any:
    """The engine's scheduler."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def canvas_states(llm: LLM) -> Any:
    """The worker's request tables."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    return worker.model_runner.model_state.canvas_states


def registry(llm: LLM) -> Any:
    """The worker's calibration profiles."""
    return scheduler(llm).calibrator.registry


def submit(llm: LLM, prompt: list[int], params: SamplingParams) -> str:
    """Queue a request; returns its id."""
    req_id = f"request-{next(_ids)}"
    params = params.clone()
    params.output_kind = RequestOutputKind.FINAL_ONLY
    llm.llm_engine.add_request(req_id, {"prompt_token_ids": list(prompt)}, params)
    return req_id


def drive(llm: LLM, on_step: Callable[[int], None] = lambda step: None) -> dict[str, Any]:
    """Run the engine step by step until it has nothing left; ``on_step(n)`` is called before step n, from 0.

    Returns:
        The first completion of each finished request, by id.
    """
    finished = {}
    for step in range(2000):
        on_step(step)
        if not llm.llm_engine.has_unfinished_requests():
            return finished
        for output in llm.llm_engine.step():
            if output.finished:
                finished[output.request_id] = output.outputs[0]
    raise AssertionError("the engine does not come to an end")


def watch_logits(monkeypatch: Any, see: Callable[[Any, Any], None]) -> None:
    """Call ``see`` with the logit rows of every step, ``[M, vocabulary]``, and its input batch."""
    from vllm_osdt.worker.model_runner import CanvasRunnerMixin

    decide = CanvasRunnerMixin._decide_by_rows

    def watching(self: Any, hidden_states: Any, input_batch: Any) -> Any:
        num_rows = input_batch.denoise.position.shape[0]
        if num_rows:
            see(self.model.compute_logits(hidden_states[:num_rows]).clone(), input_batch)
        return decide(self, hidden_states, input_batch)

    monkeypatch.setattr(CanvasRunnerMixin, "_decide_by_rows", watching)


def assert_idle(llm: LLM) -> None:
    """Nothing of any request is left behind: pages, slots, records, calibrations under way."""
    sched, states = scheduler(llm), canvas_states(llm)
    generate(llm, [[5, 6]], sampling(8, policy="static_threshold", block_length=8, threshold=0.01))
    manager = sched.kv_cache_manager
    assert not sched.running and not sched.waiting and not sched.requests
    assert manager.block_pool.get_num_free_blocks() == manager.block_pool.num_gpu_blocks - 1  # one is vLLM's null block
    llm.llm_engine.step()  # the worker hears of a request's end with the next step
    assert not states._slot_of and not sched.calibrator._decodings
    assert sched.calibrator.registry.num_calibrating == 0
