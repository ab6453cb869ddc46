"""Graphs and run-ahead change no token: engines with both, without run-ahead, and without graphs decode the same."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.gpu.decisions import recorded_on_cpu
from benchmarks.gpu.engines import runner_of, start_engine, watch_graphs
from benchmarks.gpu.lines import part
from benchmarks.gpu.shapes import SHAPES, start_shape
from benchmarks.gpu.sizes import IS_STAND_IN, SIZES

# Requests that may differ, as a share: padding may change the order of a sum, and in bf16 a near-tie with it.
MAX_DIFFERENT = {"float32": 0.0, "bfloat16": 0.1}
MAX_DIFFERENT_AT_RANDOM = 1.0  # random weights give near-ties everywhere: the share is told


def check_graphs(stage: str) -> None:
    """A bundled model in float32 and bfloat16, or a large shape in bfloat16: tokens, replays, and steps ahead."""
    name = stage.split(":")[1]
    if name in SHAPES:
        _compare(stage, "bfloat16", _of_shape(stage, name), *_random_requests(), MAX_DIFFERENT_AT_RANDOM)
        return
    for dtype in ("bfloat16",) if IS_STAND_IN else ("bfloat16", "float32"):
        _compare(stage, dtype, _of_bundled(stage, name, dtype), *_recorded_requests(name), MAX_DIFFERENT[dtype])


def _of_bundled(stage: str, name: str, dtype: str) -> Iterator[tuple[str, Any]]:
    """Engines by what they leave out."""
    from vllm_osdt.mini import model_path

    path, settings = model_path(name), {"dtype": dtype, "max_model_len": 512}
    yield "graphs", start_engine(stage, path, label=f"{dtype}, graphs", **settings)
    no_run_ahead = {"additional_config": {"osdt": {"run_ahead": False}}}
    yield "no run-ahead", start_engine(stage, path, label=f"{dtype}, no run-ahead", **settings, **no_run_ahead)
    yield "no graphs", start_engine(stage, path, label=f"{dtype}, no graphs", enforce_eager=True, **settings)


def _of_shape(stage: str, name: str) -> Iterator[tuple[str, Any]]:
    """One engine, told to leave something out: memory does not hold three."""
    llm = start_shape(stage, name)
    runner = runner_of(llm)
    yield "graphs", llm
    runner._options = replace(runner._options, run_ahead=False)
    yield "no run-ahead", llm
    runner.replays_graphs = False
    yield "no graphs", llm


def _recorded_requests(name: str) -> tuple[list[Any], list[Any]]:
    """The prompts of a bundled model, each with a threshold and with a fixed number of tokens per step."""
    from vllm import SamplingParams

    cases, params = recorded_on_cpu(name)
    cases = cases[: SIZES.num_cases]
    options = (params["extra_args"], {"osdt_policy": "fixed_steps", "osdt_steps_per_block": 8})
    asked = [SamplingParams(**{**params, "ignore_eos": True, "extra_args": one}) for one in options for _ in cases]
    return [case["prompt"] for case in cases] * len(options), asked


def _random_requests() -> tuple[list[Any], list[Any]]:
    """Random prompts for random weights."""
    import numpy as np
    from vllm import SamplingParams

    random = np.random.default_rng(0)
    number = min(8, max(SIZES.requests))
    extra_args = {"osdt_policy": "fixed_steps", "osdt_steps_per_block": 8}
    params = SamplingParams(
        temperature=0.0, max_tokens=SIZES.max_tokens, ignore_eos=True, detokenize=False, extra_args=extra_args
    )
    lengths = (SIZES.prompt_length, SIZES.prompt_length // 2)
    prompts = [random.integers(10, 500, lengths[index % 2]).tolist() for index in range(number)]
    return [{"prompt_token_ids": prompt} for prompt in prompts], [params] * number


def _compare(
    stage: str,
    dtype: str,
    engines: Iterator[tuple[str, Any]],
    prompts: list[Any],
    params: list[Any],
    max_different: float,
) -> None:
    """Decode the requests with every engine; the first one's tokens are expected of the others."""
    from vllm_osdt.engine.statistics import num_forwards

    expected: list[list[int]] | None = None
    for what, llm in engines:
        with part(stage, what, dtype=dtype, num_requests=len(prompts)) as found:
            num_steps, step = 0, llm.llm_engine.step

            def counted() -> Any:
                nonlocal num_steps
                num_steps += 1
                return step()  # noqa: B023

            llm.llm_engine.step = counted
            start = time.perf_counter()
            with watch_graphs(llm) as launched:
                outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
            llm.llm_engine.step = step
            found |= {
                "decode_s": round(time.perf_counter() - start, 3),
                "replays_per_step": round(len(launched.rows) / num_steps, 2),
                "replayed_rows": sorted(set(launched.rows)),
                "ahead": dict(launched.ahead),
                "nfe": sum(map(num_forwards, outputs)),
            }
            tokens = [list(output.token_ids) for output in outputs]
            expected = tokens if expected is None else expected
            differ = [index for index, pair in enumerate(zip(tokens, expected, strict=True)) if pair[0] != pair[1]]
            found |= {"differ": differ, "share_equal": round(1 - len(differ) / len(tokens), 3)}
            assert len(differ) <= max_different * len(tokens), "tokens differ"
            assert bool(launched.rows) == (what != "no graphs"), f"{len(launched.rows)} replays"
            assert bool(launched.ahead) == (what == "graphs"), f"steps ahead: {dict(launched.ahead)}"
