"""What structured output costs: forward passes and time a step on the bundled models, and the grammar's own time.

Decodes the same held-out problems freely, under a grammar that allows every text, which is what the order costs that a
grammar imposes, and, where answers are one letter, under a choice of letters. Then the time that the engine core needs
for the masks of a step, for a vocabulary as large as those of published models; it passes while the model runs.

    python benchmarks/bench_structured.py --json results.jsonl
    python benchmarks/bench_structured.py --models PATH --choices 8 16 32 --filtered  # chains of other lengths

- Requests of one setting run together; medians of the repetitions are printed.
- Forward passes (NFE) are counted by the engine. Answers are checked, as far as they can be.
- The large vocabulary is made up: words of random letters, and the printable characters.
"""

import argparse
import itertools
import os
import random
import statistics
import string
import time
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
import xgrammar
from common import environment, write_lines
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from vllm_osdt.engine import grammar as chains
from vllm_osdt.engine.statistics import num_forwards
from vllm_osdt.mini import model_path
from vllm_osdt.mini.tasks import check, generate

VOCABULARY = 151_936
MAX_CHOICES = chains.MAX_CHOICES
SCHEMA = '{"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}'
POLICIES: dict[str, dict[str, Any]] = {
    "one token per step": {"osdt_policy": "fixed_steps"},
    "static 0.9": {"osdt_policy": "static_threshold", "osdt_threshold": 0.9},
    "OSDT": {"osdt_policy": "osdt", "osdt_task": "bench"},
}
GRAMMARS: dict[str, dict[str, Any] | None] = {"free": None, "any text": {"regex": r"[\s\S]*"}}


def decode(
    llm: LLM, problems: list[Any], policy: str, grammar: str, repetitions: int, *, filtered: bool = False
) -> dict[str, Any]:
    """Figures of one setting; ``filtered`` is the option ``filtered_confidence``."""
    asked = GRAMMARS[grammar]
    params = [
        SamplingParams(
            max_tokens=96,
            temperature=0.0,
            structured_outputs=None if asked is None else StructuredOutputsParams(**asked),
            extra_args={**POLICIES[policy], "osdt_filtered_confidence": filtered},
        )
        for _ in problems
    ]
    step, steps, times = llm.llm_engine.step, 0, []

    def counted() -> Any:
        nonlocal steps
        steps += 1
        return step()

    llm.llm_engine.step = counted  # type: ignore[method-assign]
    for _ in range(repetitions):
        steps, start = 0, time.perf_counter()
        outputs = [one.outputs[0] for one in llm.generate([p.prompt for p in problems], params, use_tqdm=False)]
        times.append(1e3 * (time.perf_counter() - start) / steps)
    llm.llm_engine.step = step  # type: ignore[method-assign]
    num_tokens = sum(len(one.token_ids) for one in outputs)
    nfe = sum(map(num_forwards, outputs))
    right = sum(check(problem, one.text) for problem, one in zip(problems, outputs, strict=True))
    return {
        "policy": policy,
        "grammar": grammar,
        "max_choices": chains.MAX_CHOICES,
        "filtered_confidence": filtered,
        "nfe": nfe / len(problems),
        "tokens_per_forward": num_tokens / nfe,
        "step_ms": statistics.median(times),
        "right": right / len(problems),
    }


def mask_time_ms(repetitions: int) -> dict[str, Any]:
    """Time of the masks of a step of one request, at one row and at as many as a chain has at most."""
    rng = random.Random(0)
    words = {"".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7))) for _ in range(2 * VOCABULARY)}
    vocabulary = [*[*string.printable, *sorted(words)][: VOCABULARY - 1], "</s>"]
    info = xgrammar.TokenizerInfo(vocabulary, vocab_size=VOCABULARY, stop_token_ids=[VOCABULARY - 1])
    compiled = xgrammar.GrammarCompiler(info).compile_json_schema(SCHEMA)
    bitmask = xgrammar.allocate_token_bitmask(1, VOCABULARY)
    text = [vocabulary.index(one) for one in '{"name":"']
    text += [vocabulary.index(one) for one in "anna smith"[:MAX_CHOICES]]
    found: dict[str, list[float]] = {"first": [], "chain": []}
    for _ in range(repetitions):
        matcher = xgrammar.GrammarMatcher(compiled)
        for token in text[:-MAX_CHOICES]:
            assert matcher.accept_token(token)
        start = time.perf_counter()
        matcher.fill_next_token_bitmask(bitmask, 0)
        found["first"].append(1e3 * (time.perf_counter() - start))
        start = time.perf_counter()
        for token in text[-MAX_CHOICES:]:
            matcher.fill_next_token_bitmask(bitmask, 0)
            assert matcher.accept_token(token)
        matcher.rollback(MAX_CHOICES)
        found["chain"].append(1e3 * (time.perf_counter() - start))
    return {f"{name}_ms": statistics.median(values) for name, values in found.items()} | {"rows": MAX_CHOICES}


def main() -> None:
    """Measure, print, and write lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file to append lines to")
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["llada-mini", "sdar-mini"], help="bundled models, or folders")
    parser.add_argument("--choices", nargs="+", type=int, default=[MAX_CHOICES], help="positions with a choice a step")
    parser.add_argument("--filtered", action="store_true", help="also with filtered_confidence")
    arguments = parser.parse_args()
    lines: list[dict[str, Any]] = []
    torch.set_num_threads(1)
    lines.append({"benchmark": "structured", "part": "masks", "vocabulary": VOCABULARY, **mask_time_ms(20)})
    print(lines[-1])
    for model in arguments.models:
        llm = LLM(
            model if os.path.isdir(model) else model_path(model),
            dtype="float32",
            max_num_seqs=arguments.problems,
            max_model_len=256,
            additional_config={
                "osdt": {
                    "profile_dir": "",
                    "num_calibration_requests": arguments.problems,
                    "statistic": "q1",
                    "run_ahead": False,  # every step of the engine is one forward
                }
            },
        )
        problems = generate("code", "held_out", arguments.problems, seed=3)
        for policy in POLICIES:
            for grammar, asked in GRAMMARS.items():
                decode(llm, problems, policy, grammar, 1)  # compiles the grammar; calibrates the task
                sizes = [MAX_CHOICES] if asked is None else arguments.choices
                for size, filtered in itertools.product(sizes, [False, True] if arguments.filtered else [False]):
                    chains.MAX_CHOICES = size
                    found = decode(llm, problems, policy, grammar, arguments.repetitions, filtered=filtered)
                    name = os.path.basename(model)
                    lines.append({"benchmark": "structured", "part": "decoding", "model": name, **found})
                    print(lines[-1], flush=True)
                chains.MAX_CHOICES = MAX_CHOICES
        del llm
    if arguments.json:
        write_lines(arguments.json, [{**environment(), **line} for line in lines])


if __name__ == "__main__":
    main()
