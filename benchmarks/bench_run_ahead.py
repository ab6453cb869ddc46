"""How often would the next step be launched before a step's outcome is known, and how often in vain?

On a GPU the worker launches a second step of the same rows behind one whose blocks should not be finished by it
(``CanvasStates.goes_on``). The guess needs no GPU: this decodes problems on any machine, asks it at every step, and
looks at the next one. A step that would have been the second of a pair is not asked.

    python benchmarks/bench_run_ahead.py --json results.jsonl

- "pairs" is the share of the engine's steps that have a second one behind them; each saves one round trip to the host.
- "wasted" is the share of the requests' second steps whose block was finished by the first, and "rows" what those are
  of all rows.

On a CPU the worker takes steps behind another one, and knows the outcome of each. ``--speed`` decodes the problems with
and without these in turns, and says which share of the forwards they are, and what of the time is saved.
"""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import numpy as np
from common import environment, write_lines
from problems import find_source

import vllm_osdt

CONCURRENCY = (1, 8, 32)
SETTINGS: dict[str, dict[str, Any]] = {
    "static 0.9": {"policy": "static_threshold", "threshold": 0.9},
    "OSDT": {"policy": "osdt", "task": "pairs", "num_calibration_requests": 16, "risk": 0.08},
}
NUM_CALIBRATING = 16


@dataclass
class Steps:
    """What was counted.

    Attributes:
        num_steps: Steps of the engine.
        num_rows: Rows of all of them.
        num_pairs: Steps that would have had a second one behind them.
        num_second: Second steps of requests.
        num_wasted: Those of a block that the first step finished.
        wasted_rows: Their rows.
    """

    num_steps: int = 0
    num_rows: int = 0
    num_pairs: int = 0
    num_second: int = 0
    num_wasted: int = 0
    wasted_rows: int = 0
    _guessed: dict[int, tuple[int, int]] = field(default_factory=dict)  # slot: block and rows of a first step

    def see(self, states: Any, rows: Any) -> None:
        """Take in a step that is being planned."""
        self.num_steps += 1
        self.num_rows += int(rows.num_rows.sum())
        blocks = dict(zip(rows.slots.tolist(), rows.block_start.tolist(), strict=True))
        if self._guessed:
            wasted = [size for slot, (block, size) in self._guessed.items() if blocks.get(slot) != block]
            self.num_second += len(self._guessed)
            self.num_wasted += len(wasted)
            self.wasted_rows += sum(wasted)
            self._guessed = {}
        elif states.goes_on(rows.slots, rows.num_active):
            self.num_pairs += 1
            sizes = zip(rows.slots.tolist(), rows.num_rows.tolist(), strict=True)
            self._guessed = {slot: (blocks[slot], size) for slot, size in sizes}


@contextmanager
def watched(llm: Any) -> Iterator[Steps]:
    """Count the steps of an engine."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    runner = getattr(worker, "worker", worker).model_runner
    plan, steps = runner._plan, Steps()

    def seen(rows: Any, **how: Any) -> Any:
        steps.see(runner.model_state.canvas_states, rows)
        return plan(rows, **how)

    runner._plan, runner._runs_ahead = seen, False
    try:
        yield steps
    finally:
        runner._plan, runner._runs_ahead = plan, True


def speed(llm: Any, prompts: list[list[int]], params: Any, number: int, rounds: int) -> dict[str, float]:
    """What steps behind others save of an engine's time, in rounds that take turns.

    Returns:
        ``behind``, their share of the forwards, and ``saved``, the median share of the seconds.
    """
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    runner = getattr(worker, "worker", worker).model_runner
    forward, again = runner.model.forward, runner._step_again
    counts = {"forwards": 0, "behind": 0}

    def count(name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    runner.model.forward, runner._step_again = count("forwards", forward), count("behind", again)
    saved, shares = [], []
    try:
        for index in range(rounds + 1):
            seconds = {}
            for runner._runs_ahead in (True, False) if index % 2 else (False, True):
                counts.update(forwards=0, behind=0)
                start = time.perf_counter()
                send(llm, prompts, params, number)
                seconds[runner._runs_ahead] = time.perf_counter() - start
                if runner._runs_ahead:
                    shares.append(counts["behind"] / counts["forwards"])
            saved.append(1 - seconds[True] / seconds[False])
    finally:
        runner.model.forward, runner._step_again, runner._runs_ahead = forward, again, True
    return {"behind": shares[-1], "saved": float(np.median(saved[1:]))}  # the first round warms up


def main() -> None:
    """Print one line for each task, setting and number of requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["llada-mini", "sdar-mini"], help="bundled models, or rungs")
    parser.add_argument("--problems", type=int, default=64, help="of each task")
    parser.add_argument("--speed", type=int, default=0, metavar="N", help="rounds with and without, on a CPU")
    parser.add_argument("--json", type=Path, help="append JSON lines to this file")
    args = parser.parse_args()

    from vllm import LLM

    engines = []  # engines of a process share vLLM's process groups: the first one must live
    print("model, task, setting, requests: pairs, wasted, rows")
    for name in args.model:
        source = find_source(name)
        osdt = {"osdt": {"profile_dir": "", "early": False}}
        llm = LLM(source.path, dtype="float32", max_num_seqs=max(CONCURRENCY), additional_config=osdt)
        engines.append(llm)
        lines = []
        encode = llm.get_tokenizer().encode
        for task, draw in source.tasks.items():
            problems = [encode(one.prompt) for one in draw(args.problems + NUM_CALIBRATING, 7)]
            for setting, options in SETTINGS.items():
                own = {**options, "task": task} if "task" in options else options
                params = vllm_osdt.sampling_params(max_tokens=source.gen_length, **own)
                if "task" in own:
                    send(llm, problems[:NUM_CALIBRATING], params, NUM_CALIBRATING)
                for number in CONCURRENCY:
                    line = {"bench": "run_ahead", "model": source.label, "task": task, "setting": setting}
                    line |= {"concurrency": number, **environment()}
                    if args.speed:
                        found = speed(llm, problems[NUM_CALIBRATING:], params, number, args.speed)
                        print(f"{source.label}, {task}, {setting}, {number}: {found}", flush=True)
                        lines.append(line | found)
                        continue
                    with watched(llm) as steps:
                        send(llm, problems[NUM_CALIBRATING:], params, number)
                    figures = {
                        "pairs": steps.num_pairs / steps.num_steps,
                        "wasted": steps.num_wasted / max(steps.num_second, 1),
                        "rows": steps.wasted_rows / steps.num_rows,
                    }
                    shares = ", ".join(f"{100 * share:.1f} %" for share in figures.values())
                    print(f"{source.label}, {task}, {setting}, {number}: {shares}", flush=True)
                    lines.append(line | figures)
        if args.json:
            write_lines(args.json, lines)


def send(llm: Any, prompts: list[list[int]], params: Any, number: int) -> None:
    """Decode prompts, ``number`` of them at a time."""
    for first in np.arange(0, len(prompts), number):
        requests = [{"prompt_token_ids": prompt} for prompt in prompts[first : first + number]]
        llm.generate(requests, params, use_tqdm=False)


if __name__ == "__main__":
    main()
