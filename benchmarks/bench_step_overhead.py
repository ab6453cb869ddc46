"""What one denoising step costs beside the model: scheduling, input preparation, sampling and output.

Runs the engine in this process on any LLaDA checkpoint and reports, for each number of running requests, the time of
``LLMEngine.step()`` and of the model in it (forward and logits), both by forward; the difference is the overhead. A
figure is the mean of a run of all requests, and the median of the runs. A step of the engine may take several forwards
(``run_ahead``): runs with and without take turns. A second table says where the rest of a step goes, by phase, in
milliseconds. ``--clock thread`` counts the processor's time of this thread in place of the wall's, which other work on
the machine hardly touches; set ``OMP_NUM_THREADS=1`` for it. ``--profile`` samples the stack in steps of their own, and
says what share of the time beside the model each function has, with what it calls. ``--beside-stock`` measures, in
turns with ours, what a step of vLLM's own engine costs beside the model: it decodes one token after the other with a
Llama of the same shape and random weights. vLLM's kernel for slots is a Triton kernel without a twin for a CPU, where
it is interpreted; that time is left out.

    python benchmarks/bench_step_overhead.py --model CHECKPOINT --running 1 8 32
"""

import argparse
import json
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import numpy as np
import torch
from common import environment, percentiles, write_lines
from vllm import LLM, SamplingParams

SAMPLE_S = 1e-3  # of the processor's time, between two looks at the stack
MIN_SHARE = 0.02  # of a function that the profile names
MODELS, MODEL = ("vllm_osdt.models.", "vllm.model_executor.models."), (".forward", ".compute_logits")
CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time}


class Clock:
    """Adds up the seconds of the calls it wraps, without those of other clocks' calls within them."""

    _within: ClassVar[list[float]] = []  # seconds of the calls within each call that has not ended

    def __init__(self, now: Callable[[], float]) -> None:
        self.seconds = 0.0
        self.num_calls = 0
        self.now = now

    def wrap(self, function):
        """Return ``function``, timed."""

        def timed(*args, **kwargs):
            start = self.now()
            self._within.append(0.0)
            result = function(*args, **kwargs)
            seconds = self.now() - start
            self.seconds += seconds - self._within.pop()
            self.num_calls += 1
            if self._within:
                self._within[-1] += seconds
            return result

        return timed


class Phases:
    """The parts of an engine's step, each with a clock of its own."""

    def __init__(self, llm: LLM, now: Callable[[], float]) -> None:
        self.now = now
        core = llm.llm_engine.engine_core.engine_core
        self.runner = runner = core.model_executor.driver_worker.worker.model_runner
        owners = {
            "schedule": (core.scheduler, "schedule"),
            "prepare inputs": (runner, "prepare_inputs"),
            "pages, slots": (runner, "prepare_attn"),
            "attention's metadata": (runner.model_state, "prepare_attn"),
            "forward": (runner.model, "forward"),
            "logits": (runner.model, "compute_logits"),
            "confidence": (runner.head, "propose"),
            "unmask": (runner.sampler, "decide"),
            "steps ahead": (runner, "_step_again"),
            "update from output": (core.scheduler, "update_from_output"),
            "front end's output": (llm.llm_engine.output_processor, "process_outputs"),
        }
        self.clocks = {name: Clock(now) for name in owners}
        for name, (owner, attribute) in owners.items():
            setattr(owner, attribute, self.clocks[name].wrap(getattr(owner, attribute)))

    def take(self) -> dict[str, float]:
        """Milliseconds of each since the last call, and the number of forwards."""
        taken = {name: 1e3 * clock.seconds for name, clock in self.clocks.items()}
        taken["forwards"] = self.clocks["forward"].num_calls
        for clock in self.clocks.values():
            clock.seconds, clock.num_calls = 0.0, 0
        return taken


class Profile:
    """Looks at the stack of this process every ``SAMPLE_S``; functions by the looks that found them in a step."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.num_model = self.num_looks = 0

    def __enter__(self) -> "Profile":
        signal.signal(signal.SIGPROF, self.look)
        signal.setitimer(signal.ITIMER_PROF, SAMPLE_S, SAMPLE_S)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)

    def look(self, _: int, frame: FrameType | None) -> None:
        """Count the functions on the stack, up to the engine's step."""
        names = []
        while frame is not None:
            module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_qualname
            if module == "vllm.v1.engine.llm_engine" and function == "LLMEngine.step":
                self.num_looks += 1
                if any(name.startswith(MODELS) and name.endswith(MODEL) for name in names):
                    self.num_model += 1
                else:
                    self.found.update(set(names))
                return
            if module != __name__:
                names.append(f"{module}.{function}")
            frame = frame.f_back

    def table(self, running: int) -> str:
        """The functions with the largest shares."""
        beside = self.num_looks - self.num_model
        lines = [f"\n{running} running: {self.num_looks} looks at a step, {beside} of them beside the model"]
        lines += [
            f"{count / beside:>7.1%} {name}" for name, count in self.found.most_common() if count >= MIN_SHARE * beside
        ]
        return "\n".join(lines)


def measure(llm: LLM, phases: Phases, running: int, args: argparse.Namespace) -> dict[str, float]:
    """Step ``running`` equal requests to their end.

    Returns:
        Milliseconds of a forward by phase, the mean of the steps in which all of them ran.
    """
    engine = llm.llm_engine
    rng = np.random.default_rng(0)
    vocabulary = llm.model_config.get_vocab_size()
    params = SamplingParams(
        temperature=0,
        max_tokens=args.gen_length,
        ignore_eos=True,
        detokenize=False,
        extra_args={"osdt_policy": "fixed_steps", "osdt_cache_mode": args.cache},
    )
    for index in range(running):
        prompt = {"prompt_token_ids": rng.integers(2, vocabulary - 2, args.prompt_length).tolist()}
        engine.add_request(f"{running}-{index}-{time.monotonic_ns()}", prompt, params)
    steps = []
    while engine.has_unfinished_requests():
        phases.take()
        start = phases.now()
        outputs = engine.step()
        whole = (phases.now() - start) * 1e3
        if not any(output.finished for output in outputs):
            steps.append({"step": whole, **phases.take()})
    totals = {name: sum(step[name] for step in steps[1:]) for name in steps[0]}  # the first admits and allocates
    number = totals.pop("forwards")
    return {name: total / number for name, total in totals.items()}


class StockEngine:
    """vLLM's own engine with a Llama of the shape of a LLaDA checkpoint, and the clocks of its model and its slots.

    Args:
        checkpoint: Folder of the LLaDA checkpoint.
        max_running: Most requests at a time.
        now: Clock.
    """

    def __init__(self, checkpoint: str, max_running: int, now: Callable[[], float]) -> None:
        config = json.loads(Path(checkpoint, "config.json").read_text())
        llama = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": config["d_model"],
            "intermediate_size": config["mlp_hidden_size"],
            "num_hidden_layers": config["n_layers"],
            "num_attention_heads": config["n_heads"],
            "num_key_value_heads": config.get("n_kv_heads") or config["n_heads"],
            "vocab_size": config["vocab_size"],
            "max_position_embeddings": 1024,
        }
        self._folder = tempfile.TemporaryDirectory()
        Path(self._folder.name, "config.json").write_text(json.dumps(llama))
        self.llm = LLM(
            model=self._folder.name,
            skip_tokenizer_init=True,
            dtype="float32",
            max_num_seqs=max_running,
            max_model_len=256,
            load_format="dummy",
            async_scheduling=False,
        )
        self._now = now
        self._clock = Clock(now)
        runner = self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        tables, model = runner.input_batch.block_table, runner.model
        for owner, name in ((model, "forward"), (model, "compute_logits"), (tables, "compute_slot_mapping")):
            setattr(owner, name, self._clock.wrap(getattr(owner, name)))

    def measure(self, running: int, prompt_length: int, num_steps: int) -> float:
        """Mean milliseconds beside the model of the steps in which all of ``running`` requests decode a token."""
        engine, rng = self.llm.llm_engine, np.random.default_rng(0)
        params = SamplingParams(temperature=0, max_tokens=num_steps, ignore_eos=True, detokenize=False)
        for index in range(running):
            prompt: Any = {"prompt_token_ids": rng.integers(2, 64, prompt_length).tolist()}
            engine.add_request(f"stock-{running}-{index}-{time.monotonic_ns()}", prompt, params)
        found = []
        while engine.has_unfinished_requests():
            self._clock.seconds, start = 0.0, self._now()
            outputs = engine.step()
            beside = self._now() - start - self._clock.seconds
            if not any(output.finished for output in outputs):
                found.append(1e3 * beside)
        return float(np.mean(found[1:]))


def main() -> None:
    """Parse arguments, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="LLaDA checkpoint folder; default: the bundled llada-mini")
    parser.add_argument("--running", type=int, nargs="+", default=[1, 8, 32], help="numbers of running requests")
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--gen-length", type=int, default=64)
    parser.add_argument("--cache", default="dual", choices=("none", "prefix", "dual"))
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="the wall's, or the processor's of a thread")
    parser.add_argument("--repetitions", type=int, default=5, help="runs of each kind")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="times that requests run to be sampled")
    parser.add_argument("--beside-stock", action="store_true", help="measure vLLM's own engine too")
    parser.add_argument("--json", default=None, help="append JSON lines to this file")
    args = parser.parse_args()
    if args.model is None:
        from vllm_osdt.mini import model_path

        args.model = model_path("llada-mini")

    llm = LLM(
        model=args.model, skip_tokenizer_init=True, dtype="float32", max_num_seqs=max(args.running), max_model_len=256
    )
    phases = Phases(llm, CLOCKS[args.clock])
    stock = StockEngine(args.model, max(args.running), CLOCKS[args.clock]) if args.beside_stock else None
    record = environment(dtype="float32", threads=torch.get_num_threads())
    print(record)
    print(f"{'running':>8} {'ahead':>6} {'step ms':>10} {'model ms':>10} {'overhead ms':>12} {'p20':>8} {'p80':>8}")
    lines, tables = [], {}
    for running in args.running:
        measure(llm, phases, running, args)
        runs: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        of_stock = []
        for _ in range(args.repetitions):
            for runs_ahead, found in runs.items():
                phases.runner._runs_ahead = runs_ahead
                found.append(measure(llm, phases, running, args))
            if stock is not None:
                of_stock.append(stock.measure(running, args.prompt_length, args.gen_length))
        phases.runner._runs_ahead = True
        for runs_ahead, found in runs.items():
            columns = {name: np.array([run[name] for run in found]) for name in found[0]}
            step, model = columns["step"], columns["forward"] + columns["logits"]
            columns["rest"] = 2 * step - sum(columns.values())
            table = tables[running, runs_ahead] = {name: float(np.median(times)) for name, times in columns.items()}
            p20, median, p80 = percentiles(step - model)
            ahead, whole, beside = "yes" if runs_ahead else "no", np.median(step), np.median(model)
            print(f"{running:>8} {ahead:>6} {whole:>10.2f} {beside:>10.2f} {median:>12.2f} {p20:>8.2f} {p80:>8.2f}")
            lines.append(
                {
                    **record,
                    "bench": "step_overhead",
                    "model": os.path.basename(args.model.rstrip("/")),
                    "running": running,
                    "cache": args.cache,
                    "clock": args.clock,
                    "run_ahead": runs_ahead,
                    "step_ms": float(whole),
                    "model_ms": float(beside),
                    "overhead_ms": median,
                    "overhead_p20_ms": p20,
                    "overhead_p80_ms": p80,
                    "runs": len(found),
                    "phases_ms": table,
                }
            )
            if stock is not None:
                lines[-1]["stock_overhead_ms"] = float(np.median(of_stock))
        if stock is not None:
            print(f"{running:>8} vLLM's own engine, one token a step: {np.median(of_stock):.2f} ms beside the model")
    print(f"{'phase':20}" + "".join(f"{running:>5}{' ahead' if ahead else '      '}" for running, ahead in tables))
    for name in next(iter(tables.values())):
        print(f"{name:20}" + "".join(f"{table[name]:>11.3f}" for table in tables.values()))
    for running in args.running if args.profile else ():
        with Profile() as profile:
            for _ in range(args.profile):
                measure(llm, phases, running, args)
        print(profile.table(running))
    if args.json:
        write_lines(args.json, lines)


if __name__ == "__main__":
    main()
