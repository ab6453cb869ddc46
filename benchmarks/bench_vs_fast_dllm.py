"""Is serving through vLLM faster than stock Fast-dLLM v1 on the same work?

Runs a checkout of NVlabs/Fast-dLLM in its own environment and this package's engine on the same weights, prompts,
decoding policy (static threshold), cache mode, dtype and number of threads, in alternation (baseline, engine,
baseline, engine, ...), and prints tokens per second, forward passes and their ratio for several numbers of concurrent
requests. Each side is a process of its own that loads the model once and has the same thread settings, so neither
disturbs the other; only decoding is timed, from token ids to token ids.

    make fast-dllm-env
    python benchmarks/bench_vs_fast_dllm.py --fast-dllm CHECKOUT --prompts gsm8k_test.jsonl

Conditions:

- Fast-dLLM v1 has no continuous batching. Its evaluation decodes one request at a time: in older versions the canvas
  has one row whatever the batch, in newer ones a batch needs prompts of one length and is decoded until its slowest row
  is done. With prompts of several lengths, one after another is its supported way, so its figures at concurrency N
  are those of N requests in turn.
- The engine gets N requests at once and a new one whenever one ends.
- Both sides decode exactly ``--gen-length`` tokens of each request: v1 does not stop at the end-of-sequence token, so
  the engine is told to ignore it.
- NFE counts every forward pass in which a request takes part, refreshes of the cache included, on both sides. v1 runs
  one forward more in a block that its first forward has filled.
- In float32 both sides decode the same tokens. In bfloat16 rounding differs and ties are common, so agreement is
  information only.
- ``random-130m`` is LLaDA-shaped with random weights, made here from a fixed seed. Its confidences are tiny, so both
  sides unmask one token per forward: it shows the cost of a forward, not the effect of the policy.

Prompts: the bundled model gets held-out problems of its own tasks. Other models get the questions of ``--prompts``
(JSON lines with ``question`` or ``prompt_token_ids``) when they have a tokenizer.json, else random token ids: as many
as the question has words, times 1.3, or from 48 to 160 without a file.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import REPOSITORY, Worker, commit_of, environment, serve, summary, write_lines

BUNDLED, RANDOM = "llada-mini", "random-130m"
TOKENS_PER_WORD = 1.3  # of English under the tokenizers of 32,000 entries that this shape comes with
RANDOM_LENGTHS = (48, 160)
SEED = 0

# Fields as in published LLaDA checkpoints; 134 million parameters, head size 64.
RANDOM_CONFIG = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "torch_dtype": "bfloat16",
    "activation_type": "silu",
    "alibi": False,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 768,
    "embedding_dropout": 0.0,
    "embedding_size": 32000,
    "eos_token_id": 0,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_device": "cpu",
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 31999,
    "max_sequence_length": 1024,
    "mlp_hidden_size": 2048,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "n_heads": 12,
    "n_kv_heads": 12,
    "n_layers": 12,
    "pad_token_id": 0,
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "use_cache": False,
    "vocab_size": 32000,
    "weight_tying": False,
}

# F: Fast-dLLM, v: vllm-osdt. The second ratio is by CPU time: what a shared machine's other load leaves standing.
HEADER = (
    f"{'':>11}{'':>9}{'tokens/s':>20}{'ratio by':>16}{'NFE':>16}{'tokens/forward':>17}{'requests':>12}\n"
    f"{'concurrency':>11}{'requests':>9}{'F':>10}{'v':>10}{'time':>8}{'CPU':>8}{'F':>8}{'v':>8}{'F':>9}{'v':>8}"
    f"{'identical':>12}"
)


@dataclass(frozen=True)
class Workload:
    """A checkpoint and the distinct prompts that both sides decode."""

    name: str
    folder: Path
    dtype: str
    mask_token_id: int
    prompts: list[list[int]]
    source: str

    def requests(self, concurrency: int) -> list[list[int]]:
        """The prompts, repeated as a whole until there are at least ``concurrency``.

        Neither side keeps anything from one request to the next, so the baseline's rate on the distinct prompts is its
        rate on these.
        """
        return self.prompts * -(-concurrency // len(self.prompts))


def make_random_model(folder: Path) -> None:
    """Write the random model, unless it is there."""
    if (folder / "config.json").exists():
        return
    import torch
    from safetensors.torch import save_file

    config, generator = RANDOM_CONFIG, torch.Generator().manual_seed(SEED)
    width, hidden, vocabulary = config["d_model"], config["mlp_hidden_size"], config["vocab_size"]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * 0.02).to(torch.bfloat16)

    root = "model.transformer."
    weights = {f"{root}wte.weight": matrix(vocabulary, width)}
    for layer in range(config["n_layers"]):
        block = f"{root}blocks.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            weights[f"{block}{name}.weight"] = matrix(width, width)
        weights[f"{block}ff_proj.weight"] = matrix(hidden, width)
        weights[f"{block}up_proj.weight"] = matrix(hidden, width)
        weights[f"{block}ff_out.weight"] = matrix(width, hidden)
        for name in ("attn_norm", "ff_norm"):
            weights[f"{block}{name}.weight"] = torch.ones(width, dtype=torch.bfloat16)
    weights[f"{root}ln_f.weight"] = torch.ones(width, dtype=torch.bfloat16)
    head = matrix(vocabulary, width)
    head[config["mask_token_id"]] = 0  # v1 loops for ever on a position whose best token is the mask token
    weights[f"{root}ff_out.weight"] = head
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")  # last: it says that the rest is there


def bundled_prompts(folder: Path, count: int) -> list[list[int]]:
    """Held-out problems of the bundled model's tasks, in turn."""
    from tokenizers import Tokenizer

    from vllm_osdt.mini.tasks import TASKS, generate

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    per_task = -(-count // len(TASKS))
    by_task = [generate(task, "held_out", per_task, seed=SEED) for task in TASKS]
    problems = itertools.chain.from_iterable(zip(*by_task, strict=True))
    return [tokenizer.encode(problem.prompt).ids for problem in itertools.islice(problems, count)]


def file_prompts(path: Path, folder: Path, count: int, draw: Callable[[int], list[int]]) -> list[list[int]]:
    """The first prompts of a file of JSON lines."""
    with path.open() as file:
        lines = [json.loads(line) for line in itertools.islice(file, count)]
    tokenizer = None
    if (folder / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = []
    for line in lines:
        if "prompt_token_ids" in line:
            prompts.append(line["prompt_token_ids"])
        elif tokenizer is not None:
            prompts.append(tokenizer.encode(line["question"]).ids)
        else:
            prompts.append(draw(round(len(line["question"].split()) * TOKENS_PER_WORD)))
    return prompts


def load_workload(model: str, args: argparse.Namespace) -> Workload:
    """Find or make the checkpoint, and its prompts."""
    if model == RANDOM:
        folder = Path(args.cache_dir) / f"{RANDOM}-seed{SEED}"
        make_random_model(folder)
    elif model == BUNDLED:
        from vllm_osdt.mini import model_path

        folder = Path(model_path(BUNDLED))
    else:
        folder = Path(model)
    if not (folder / "config.json").exists():
        raise SystemExit(f"{model}: no config.json in {folder}; expected {BUNDLED}, {RANDOM} or a LLaDA checkpoint.")
    config = json.loads((folder / "config.json").read_text())
    mask, vocabulary = config["mask_token_id"], config["vocab_size"]
    import numpy as np

    rng = np.random.default_rng(SEED)

    def draw(length: int) -> list[int]:
        ids = rng.integers(0, vocabulary - 1, size=length)
        return (ids + (ids >= mask)).tolist()  # every token but the mask token

    count = args.requests or (4 if model == RANDOM else 32)
    if model == BUNDLED:
        prompts, source = bundled_prompts(folder, count), "held-out problems of its tasks"
    elif args.prompts:
        prompts, source = file_prompts(Path(args.prompts), folder, count, draw), Path(args.prompts).name
    else:
        lengths = rng.integers(*RANDOM_LENGTHS, endpoint=True, size=count)
        prompts, source = [draw(int(length)) for length in lengths], "random lengths"
    longest = config["max_sequence_length"] - args.gen_length
    if max(map(len, prompts)) > longest:
        raise SystemExit(
            f"{model}: a prompt has {max(map(len, prompts))} tokens; with --gen-length {args.gen_length} at most "
            f"{longest} fit into max_sequence_length {config['max_sequence_length']}."
        )
    dtype = args.dtype or ("bfloat16" if model == RANDOM else "float32")
    return Workload(folder.name if model not in (BUNDLED, RANDOM) else model, folder, dtype, mask, prompts, source)


def start_engine(config: dict[str, Any]) -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    """Load the model into vLLM, in this process.

    Args:
        config: ``model``, ``dtype``, ``threads``, ``cache``, ``threshold``, ``gen_length``, ``block_length``,
            ``max_num_seqs``.
    """
    import torch
    from vllm import LLM, SamplingParams

    torch.set_num_threads(config["threads"])
    llm = LLM(
        model=config["model"],
        skip_tokenizer_init=True,
        dtype=config["dtype"],
        max_num_seqs=config["max_num_seqs"],
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )
    engine, ids = llm.llm_engine, itertools.count()
    params = SamplingParams(
        temperature=0,
        max_tokens=config["gen_length"],
        ignore_eos=True,
        detokenize=False,
        extra_args={
            "osdt_policy": "static_threshold",
            "osdt_threshold": config["threshold"],
            "osdt_cache": config["cache"],
            "osdt_block_length": config["block_length"],
            "osdt_gen_length": config["gen_length"],
        },
    )

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        waiting = deque((str(next(ids)), prompt) for prompt in request["prompts"])
        order = [request_id for request_id, _ in waiting]
        done: dict[str, Any] = {}
        running = 0
        begin, cpu_begin = time.perf_counter(), time.process_time()
        while waiting or running:
            while waiting and running < request["concurrency"]:
                request_id, prompt = waiting.popleft()
                engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
                running += 1
            for output in engine.step():
                if output.finished:
                    done[output.request_id] = output.outputs[0]
                    running -= 1
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "outputs": [list(done[request_id].token_ids) for request_id in order],
            # vLLM's histogram of accepted tokens per step counts each forward of the request once.
            "nfe": [sum(done[request_id].spec_decode_metrics.histogram) for request_id in order],
        }

    vllm_config = engine.vllm_config
    hello = {
        "threads": torch.get_num_threads(),
        "parameters": None,
        "max_num_seqs": vllm_config.scheduler_config.max_num_seqs,
        "max_num_batched_tokens": vllm_config.scheduler_config.max_num_batched_tokens,
        "kv_cache_gib": float(os.environ["VLLM_CPU_KVCACHE_SPACE"]),
    }
    return hello, answer


def worker_env(threads: int) -> dict[str, str]:
    """Environment of both sides."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        env[name] = str(threads)
    env.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    return env


def engine_env(threads: int) -> dict[str, str]:
    """The same with vLLM's own settings."""
    env = worker_env(threads)
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    env.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    path = os.environ.get("PYTHONPATH")
    return env if path is None else env | {"PYTHONPATH": path}


def rates(result: dict[str, Any]) -> dict[str, float]:
    """Figures of one measurement."""
    tokens, nfe = sum(map(len, result["outputs"])), sum(result["nfe"])
    return {
        "tokens_per_s": tokens / result["seconds"],
        "tokens_per_cpu_s": tokens / result["cpu_seconds"],
        "nfe": nfe / len(result["nfe"]),
        "tokens_per_forward": tokens / nfe,
    }


def compare(workload: Workload, args: argparse.Namespace, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure both sides on one model; returns a JSON line per concurrency."""
    decoding = {
        "cache": args.cache,
        "threshold": args.threshold,
        "gen_length": args.gen_length,
        "block_length": args.block_length,
    }
    config = {"model": str(workload.folder), "dtype": workload.dtype, "threads": args.threads, **decoding}
    stock_config = {**config, "checkout": args.fast_dllm, "mask_token_id": workload.mask_token_id}
    engine_config = {**config, "max_num_seqs": max(args.concurrency)}
    here = Path(__file__).resolve().parent
    workers: list[Worker] = []
    try:
        stock = Worker(
            [args.python, str(here / "fast_dllm_runner.py"), json.dumps(stock_config)], worker_env(args.threads)
        )
        workers.append(stock)
        engine = Worker(
            [sys.executable, str(here / "bench_vs_fast_dllm.py"), "--engine", json.dumps(engine_config)],
            engine_env(args.threads),
        )
        workers.append(engine)
        lengths = list(map(len, workload.prompts))
        print(
            f"\n{workload.name}: {stock.hello['parameters'] / 1e6:.1f} M parameters, {workload.dtype}, threads "
            f"{stock.hello['threads']} and {engine.hello['threads']}, {len(lengths)} prompts of {min(lengths)} to "
            f"{max(lengths)} tokens ({workload.source})\n"
            f"baseline: {', '.join(f'{name} {version}' for name, version in stock.hello['versions'].items())}\n"
            f"{HEADER}"
        )
        warm_up = {"prompts": workload.prompts[:1], "concurrency": 1}
        stock.ask(warm_up)
        engine.ask(warm_up)
        lines = []
        for concurrency in args.concurrency:
            requests = workload.requests(concurrency)
            ours, theirs = [], []
            for _ in range(args.repetitions):
                theirs.append(stock.ask({"prompts": workload.prompts}))
                ours.append(engine.ask({"prompts": requests, "concurrency": concurrency}))
            lines.append(
                {
                    **record,
                    "versions": {**record["versions"], "fast_dllm": stock.hello["versions"]},
                    "model": workload.name,
                    "parameters": stock.hello["parameters"],
                    "task": workload.source,
                    "dtype": workload.dtype,
                    "policy": {"name": "static_threshold", "threshold": args.threshold},
                    **{name: decoding[name] for name in ("cache", "gen_length", "block_length")},
                    "prompt_tokens": summary(lengths),
                    "num_prompts": len(lengths),
                    "concurrency": concurrency,
                    "num_requests": len(requests),
                    "repetitions": args.repetitions,
                    **{name: engine.hello[name] for name in ("max_num_batched_tokens", "kv_cache_gib")},
                    **outcome(theirs, ours),
                }
            )
            print(row(lines[-1]), flush=True)
        return lines
    finally:
        for worker in workers:
            worker.close()


def outcome(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """Both sides' figures over the repetitions, the ratio of each pair, and how many requests have the same tokens."""
    stock_rates, engine_rates = list(map(rates, theirs)), list(map(rates, ours))
    expected = theirs[0]["outputs"]
    same = [
        output == expected[index % len(expected)] for result in ours for index, output in enumerate(result["outputs"])
    ]

    def side(measured: list[dict[str, float]]) -> dict[str, Any]:
        speeds = {name: summary([rate[name] for rate in measured]) for name in ("tokens_per_s", "tokens_per_cpu_s")}
        return {**speeds, **{name: measured[0][name] for name in ("nfe", "tokens_per_forward")}}

    def ratio(name: str) -> dict[str, float]:
        pairs = zip(engine_rates, stock_rates, strict=True)
        return summary([engine[name] / stock[name] for engine, stock in pairs])

    return {
        "fast_dllm": side(stock_rates),
        "vllm_osdt": side(engine_rates),
        "ratio": ratio("tokens_per_s"),
        "ratio_by_cpu_time": ratio("tokens_per_cpu_s"),
        "requests_compared": len(same),
        "requests_identical": sum(same),
    }


def row(line: dict[str, Any]) -> str:
    """One table row."""
    stock, engine = line["fast_dllm"], line["vllm_osdt"]
    identical = f"{line['requests_identical']}/{line['requests_compared']}"
    return (
        f"{line['concurrency']:>11}{line['num_requests']:>9}"
        f"{stock['tokens_per_s']['median']:>10.1f}{engine['tokens_per_s']['median']:>10.1f}"
        f"{line['ratio']['median']:>7.2f}x{line['ratio_by_cpu_time']['median']:>7.2f}x"
        f"{stock['nfe']:>8.1f}{engine['nfe']:>8.1f}"
        f"{stock['tokens_per_forward']:>9.2f}{engine['tokens_per_forward']:>8.2f}{identical:>12}"
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast-dllm", metavar="CHECKOUT", help="checkout of NVlabs/Fast-dLLM")
    parser.add_argument(
        "--python",
        metavar="INTERPRETER",
        default=str(REPOSITORY / ".venv-fast-dllm" / "bin" / "python"),
        help="Python of Fast-dLLM's environment (default: the one of make fast-dllm-env)",
    )
    parser.add_argument(
        "--models",
        "--model",
        nargs="+",
        default=[BUNDLED, RANDOM],
        metavar="MODEL",
        help=f"{BUNDLED}, {RANDOM} or folders of LLaDA checkpoints (default: the first two)",
    )
    parser.add_argument("--prompts", metavar="FILE", help="JSON lines with question or prompt_token_ids")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument(
        "--requests",
        type=int,
        help=f"distinct prompts (default: 32; 4 for {RANDOM}); the engine gets all of them, repeated to fill its "
        "concurrency",
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--gen-length", type=int, default=128)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--cache", choices=("none", "prefix", "dual"), default="dual")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help=f"default: bfloat16 for {RANDOM}, else float32"
    )
    parser.add_argument("--threads", type=int, default=1, help="of either side (default: 1)")
    parser.add_argument(
        "--cache-dir", default=str(Path(tempfile.gettempdir()) / "vllm-osdt-bench"), help=f"where {RANDOM} is kept"
    )
    parser.add_argument("--json", metavar="FILE", help="append a JSON line per model and concurrency")
    parser.add_argument("--engine", help=argparse.SUPPRESS)  # this script's own second process
    return parser.parse_args()


def main() -> None:
    """Compare, print, write."""
    args = parse_arguments()
    if args.engine is not None:
        serve(lambda: start_engine(json.loads(args.engine)))
        return
    if args.fast_dllm is None:
        print("Skipped: there is no baseline. Give --fast-dllm CHECKOUT, a checkout of NVlabs/Fast-dLLM.")
        return
    from fast_dllm_runner import source_folder

    source_folder(args.fast_dllm)
    workloads = [load_workload(model, args) for model in args.models]
    record = environment(
        bench="vs_fast_dllm", fast_dllm_commit=commit_of(args.fast_dllm), threads=args.threads, date=time.strftime("%F")
    )
    print(
        f"vllm-osdt {record['commit']}, Fast-dLLM {record['fast_dllm_commit']}\n"
        f"{', '.join(f'{name} {version}' for name, version in record['versions'].items())}\n"
        f"{record['cpu']}, {record['cores']} cores, {args.threads} thread(s) per side, load average "
        f"{record['load_average']}\n"
        f"static threshold {args.threshold}, cache {args.cache}, {args.gen_length} tokens in blocks of "
        f"{args.block_length}, median of {args.repetitions} alternating repetitions"
    )
    for workload in workloads:
        lines = compare(workload, args, record)
        print(
            "ratio, p20 to p80: "
            + ", ".join(f"{line['ratio']['p20']:.2f} to {line['ratio']['p80']:.2f}" for line in lines)
        )
        if args.json:
            write_lines(args.json, lines)


if __name__ == "__main__":
    main()
