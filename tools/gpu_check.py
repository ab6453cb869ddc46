"""What only a GPU shows, in stages: kernels, attention, engines, recorded decisions, speed and memory.

    make gpu-check                                             # all stages
    python tools/gpu_check.py --only environment kernels       # some of them
    python tools/gpu_check.py --budget 420                     # stages that fit into 420 seconds

Each stage is a process of its own with a time limit. Each part of a stage is a JSON line, with its time in seconds. A
part that fails is a line too; its traceback is kept, and the next part or stage begins. The status is 1 if one failed.

Lines are appended to ``benchmarks/results/gpu.jsonl``; tracebacks, logs and traces are in ``build/gpu_check``. Where
the environment variable ``OUT`` names a folder, all of it goes there. ``--stand-in`` runs tiny sizes on the stand-in
for CUDA of ``tests/cuda_stand_in``, in its environment. That shows that the stages run, and no speed; its lines are in
the other folder, too.
"""

import argparse
import contextlib
import gzip
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent if (HERE.parent / "vllm_osdt").is_dir() else Path.cwd()
IS_STAND_IN = "--stand-in" in sys.argv
OUT = Path(os.environ["OUT"]) if "OUT" in os.environ else ROOT / "build" / "gpu_check"
RESULTS = (OUT if IS_STAND_IN or "OUT" in os.environ else ROOT / "benchmarks" / "results") / "gpu.jsonl"
MIN_SECONDS = 20  # a stage with less time left is not started


@dataclass(frozen=True)
class Sizes:
    """How much a stage does."""

    vocabularies: tuple[int, ...] = (203, 126464, 151936, 262144)
    rows: tuple[int, ...] = (1, 32, 256, 1024)
    blocks: tuple[tuple[int, int], ...] = ((1, 32), (64, 8), (64, 32), (256, 32), (32, 64), (8, 128))
    num_cases: int | None = None  # of a recorded family; None: all
    num_problems: int = 64
    num_tasks: int | None = None
    requests: tuple[int, ...] = (1, 8, 32)
    prompt_length: int = 128
    num_blocks: int = 4
    shape: tuple[tuple[str, int], ...] = ()  # fields of the large models that are replaced
    max_num_seqs: int = 64


TINY = Sizes(
    vocabularies=(203,),
    rows=(1, 4),
    blocks=((1, 32), (3, 8)),
    num_cases=1,
    num_problems=2,
    num_tasks=1,
    requests=(1, 2),
    prompt_length=16,
    num_blocks=1,
    shape=(
        ("d_model", 64), ("n_heads", 2), ("n_kv_heads", 2), ("n_layers", 2), ("mlp_hidden_size", 128),
        ("hidden_size", 64), ("num_attention_heads", 2), ("num_key_value_heads", 1), ("num_hidden_layers", 2),
        ("intermediate_size", 128), ("vocab_size", 512), ("embedding_size", 512), ("mask_token_id", 511),
        ("eos_token_id", 510), ("pad_token_id", 510),
    ),
    max_num_seqs=4,
)  # fmt: skip
SIZES = TINY if IS_STAND_IN else Sizes()


# ---------------------------------------------------------------- report


def emit(stage: str, what: str, **fields: Any) -> None:
    """Write a line, to the results and to standard output."""
    torch = sys.modules.get("torch")
    card = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    line = json.dumps({"stage": stage, "what": what, "gpu": card, **fields}, default=str)
    print(line, flush=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(line + "\n")


@contextlib.contextmanager
def part(stage: str, what: str, **fields: Any) -> Iterator[dict[str, Any]]:
    """Time a part; what the block puts into the dictionary is on its line.

    A failure is on the line, too. The stage goes on, unless the GPU is lost.
    """
    start, found = time.perf_counter(), dict(fields)
    try:
        yield found
    except Exception as error:
        text = traceback.format_exc()
        seconds = round(time.perf_counter() - start, 2)
        emit(stage, what, ok=False, seconds=seconds, error=f"{type(error).__name__}: {str(error)[:400]}", **found)
        OUT.mkdir(parents=True, exist_ok=True)
        with (OUT / "tracebacks.txt").open("a") as file:
            file.write(f"==== {stage}: {what}\n{text}\n")
        if "CUDA error" in text or "illegal memory access" in text:
            raise SystemExit(3) from error
    else:
        emit(stage, what, ok=True, seconds=round(time.perf_counter() - start, 2), **found)


def median_us(call: Callable[[], object]) -> float | None:
    """Median of a call on the GPU in microseconds; None on the stand-in, which has no speed."""
    if IS_STAND_IN:
        return None
    import triton.testing

    return round(1e3 * triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median"), 1)


# ---------------------------------------------------------------- stages without an engine


def check_environment(stage: str) -> None:
    """The machine, vLLM's platform, and that kernels are compiled and not interpreted."""
    with part(stage, "machine") as found:
        import torch

        from benchmarks.common import environment

        card = torch.cuda.get_device_properties(0)
        found |= environment(
            capability=f"{card.major}.{card.minor}",
            memory_gib=round(card.total_memory / 2**30, 1),
            num_multiprocessors=card.multi_processor_count,
        )
        del found["gpu"]
    with part(stage, "vLLM sees the GPU") as found:
        from vllm.platforms import current_platform

        found["platform"] = type(current_platform).__name__
        assert current_platform.is_cuda()
    with part(stage, "kernels are compiled"):
        from vllm_osdt.host.cpu.triton_backend.interpreter import is_interpreting
        from vllm_osdt.plugin import register

        register()
        assert IS_STAND_IN or not is_interpreting()
    with part(stage, "a small copy to the device, host time") as found:
        import numpy as np
        import torch

        from vllm_osdt.worker.transfer import to_device

        values, device = np.arange(256), torch.device("cuda:0")
        for _ in range(20):
            to_device(values, device)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            to_device(values, device)
        found["us"] = round((time.perf_counter() - start) / 200 * 1e6, 1)


def check_libraries(stage: str) -> None:
    """vLLM's C++ kernels and FlashAttention against PyTorch."""
    import torch

    with part(stage, "norm and activation, largest error") as found:
        import vllm._custom_ops as ops

        x, weight = (torch.randn(*size, device="cuda", dtype=torch.bfloat16) for size in ((37, 4096), (4096,)))
        out = torch.empty_like(x)
        ops.rms_norm(out, x, weight, 1e-6)
        expected = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight
        found["rms_norm"] = (out.float() - expected.float()).abs().max().item()
        half = torch.empty(37, 2048, device="cuda", dtype=torch.bfloat16)
        torch.ops._C.silu_and_mul(half, x)
        expected = torch.nn.functional.silu(x[:, :2048].float()) * x[:, 2048:].float()
        found["silu_and_mul"] = (half.float() - expected).abs().max().item()
    with part(stage, "the device reads mapped memory"):
        from vllm.v1.worker.gpu.buffer_utils import UvaBuffer

        buffer = UvaBuffer(8, torch.int32)
        buffer.np[3] = 77
        assert buffer.uva().tolist()[3] == 77
    for version in (3, 4) if has_flash_attention_4() else (3,):
        with part(stage, "FlashAttention without a mask, largest error", version=version) as found:
            from vllm.vllm_flash_attn import flash_attn_varlen_func

            query, key, value = (torch.randn(64, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
            ends = torch.tensor([0, 64], dtype=torch.int32, device="cuda")
            lengths = {"max_seqlen_q": 64, "cu_seqlens_q": ends, "max_seqlen_k": 64, "cu_seqlens_k": ends}
            out = flash_attn_varlen_func(query, key, value, causal=False, fa_version=version, **lengths)
            out = out[0] if isinstance(out, tuple) else out
            heads = (tensor.transpose(0, 1)[None].float() for tensor in (query, key, value))
            expected = torch.nn.functional.scaled_dot_product_attention(*heads)[0].transpose(0, 1)
            found["error"] = (out.float() - expected).abs().max().item()
            assert found["error"] < 0.03


def check_kernels(stage: str) -> None:
    """Both Triton kernels against their readable twins, with their share of the bandwidth of a copy."""
    import torch

    import csrc_triton
    from csrc_triton import reference

    for vocabulary in SIZES.vocabularies:
        for dtype in (torch.float32, torch.bfloat16):
            for case in ("greedy", "sampled", "entropy", "sampled, entropy"):
                what = {"vocabulary": vocabulary, "dtype": str(dtype)[6:], "case": case}
                with part(stage, "confidence", **what) as found:
                    for num_rows in SIZES.rows if case == "greedy" else SIZES.rows[1:2]:
                        logits, options = _logits(num_rows, vocabulary, dtype, case)
                        start = time.perf_counter()
                        token, probability = csrc_triton.confidence(logits, **options)
                        torch.cuda.synchronize()
                        found.setdefault("first_call_s", round(time.perf_counter() - start, 2))
                        head = slice(min(num_rows, 32))  # the twin keeps fp64 copies of the logits
                        few = {name: v[head] if torch.is_tensor(v) else v for name, v in options.items()}
                        expected, expected_probability = reference.confidence(logits[head], **few)
                        same = token[head] == expected
                        # Logarithms differ in the last bit: a sampled near-tie may fall the other way.
                        share = same.float().mean().item()
                        assert share >= (0.9 if "sampled" in case else 1.0), f"{share:.1%} of the twin's tokens"
                        both = (probability[head][same], expected_probability[same])
                        torch.testing.assert_close(*both, rtol=2e-5, atol=1e-30)
                        if (us := median_us(lambda: csrc_triton.confidence(logits, **options))) is not None:  # noqa: B023
                            copy_us = median_us(logits.clone)
                            num_bytes = logits.numel() * logits.element_size()
                            found[f"rows_{num_rows}"] = {
                                "us": us,
                                "GB_per_s": round(num_bytes / us / 1e3),
                                "copy_GB_per_s": round(2 * num_bytes / copy_us / 1e3) if copy_us else None,
                            }
    for num_blocks, block_length in SIZES.blocks:
        with part(stage, "unmask", num_blocks=num_blocks, block_length=block_length) as found:
            arguments = _decisions(num_blocks, block_length)
            on_device = [some._make(tensor.to("cuda") for tensor in some) for some in arguments]
            blocks, masked = on_device[0], on_device[0].masked.clone()
            start = time.perf_counter()
            canvas, _, result = csrc_triton.unmask(*on_device)
            torch.cuda.synchronize()
            found["first_call_s"] = round(time.perf_counter() - start, 2)
            expected_canvas, _, expected = reference.unmask(*arguments)
            for name, count in result._asdict().items():
                assert torch.equal(count.cpu(), getattr(expected, name)), f"{name} differs from the twin's"
            assert torch.equal(canvas.cpu(), expected_canvas), "tokens differ from the twin's"
            assert torch.equal(blocks.masked.cpu(), arguments[0].masked), "masks differ from the twin's"

            def run() -> None:
                blocks.masked.copy_(masked)  # noqa: B023
                csrc_triton.unmask(*on_device)  # noqa: B023

            found["us"] = median_us(run)


def _logits(num_rows: int, vocabulary: int, dtype: Any, case: str) -> tuple[Any, dict[str, Any]]:
    """Logits ``[num_rows, vocabulary]`` with one likely token, as of a trained model, and options of the op."""
    import torch

    torch.manual_seed(0)
    logits = (3 * torch.randn(num_rows, vocabulary, device="cuda")).to(dtype)
    logits[:, 7] += 20
    options: dict[str, Any] = {"excluded_token_id": 5}
    if "sampled" in case:
        options["temperature"] = torch.full((num_rows,), 0.7, device="cuda")
        options["noise_key"] = torch.arange(num_rows, device="cuda")
    if "entropy" in case:
        options["by_entropy"] = torch.ones(num_rows, dtype=torch.bool, device="cuda")
    return logits, options


def _decisions(num_blocks: int, block_length: int) -> list[Any]:
    """Arguments of ``unmask`` on the host: blocks one after the other in the tables, every rule in turn."""
    import torch

    from csrc_triton import Blocks, Proposals, Rule, Rules

    parameters = {Rule.THRESHOLD: 0.9, Rule.TOP_K: 3.0, Rule.FACTOR: 1.0, Rule.JOINT_BOUND: 0.75}
    parameters[Rule.ENTROPY_BOUND] = 0.01
    torch.manual_seed(0)
    number = num_blocks * block_length
    rule = [list(Rule)[index % len(Rule)] for index in range(num_blocks)]
    blocks = Blocks(
        cells=torch.randint(0, 1000, (number,), dtype=torch.int32),
        masked=torch.rand(num_blocks, block_length) < 0.7,
        slots=torch.arange(num_blocks),
        canvas_index=torch.arange(number).view(num_blocks, block_length),
        end_token_ids=torch.full((num_blocks, 8), 2),
        num_output_positions=torch.full((num_blocks,), block_length, dtype=torch.int32),
    )
    proposals = Proposals(torch.arange(number), torch.randint(0, 1000, (number,)), torch.rand(number))
    min_unmask = torch.zeros(num_blocks, dtype=torch.int32)
    rules = Rules(torch.tensor(rule, dtype=torch.int8), torch.tensor([parameters[one] for one in rule]), min_unmask)
    return [blocks, proposals, rules]


# ---------------------------------------------------------------- engines

ENGINES: list[Any] = []  # an engine that goes takes the process groups of all engines of its process along
PROMPT = "quiz : pick one tool . A cow B saw C fig . Answer:"


def start_engine(stage: str, model: str | Path, **arguments: Any) -> Any:
    """An engine in this process; where its default attention does not start, with vLLM's Triton kernel.

    Raises:
        RuntimeError: Neither starts.
    """
    from vllm import LLM

    defaults: dict[str, Any] = {"disable_log_stats": True, "max_num_seqs": SIZES.max_num_seqs}
    if "load_format" not in arguments:  # some engines run beside each other: a memory profile would count the others'
        defaults["kv_cache_memory_bytes"] = 2**28 if IS_STAND_IN else 2**30
    if arguments.get("dtype") == "float32":  # Triton multiplies float32 in TF32 else, and confidences are 1e-3 off
        os.environ["TRITON_F32_DEFAULT"] = "ieee"
    for choice in ({}, {"attention_backend": "TRITON_ATTN"}):
        with part(stage, "start", model=Path(model).name, **choice) as found:
            llm = LLM(str(model), **{**defaults, **arguments, **choice})
            ENGINES.append(llm)
            groups = [group for some in runner_of(llm).attn_groups for group in some]
            found["attention"] = sorted({group.backend.get_name() for group in groups})
            layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
            versions = {getattr(getattr(layer, "impl", None), "vllm_flash_attn_version", None) for layer in layers}
            found["flash_attention"] = sorted(versions - {None})
            found["num_pages"] = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
            found["cudagraph_mode"] = str(llm.llm_engine.vllm_config.compilation_config.cudagraph_mode)
            return llm
    raise RuntimeError(f"no engine for {model}")


def runner_of(llm: Any) -> Any:
    """The model runner."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    return getattr(worker, "worker", worker).model_runner


def recorded_on_cpu(name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What a CPU engine decoded with a bundled model, and with which sampling parameters."""
    import tests.cuda_stand_in

    recorded = json.loads((Path(tests.cuda_stand_in.__file__).parent / "cpu_tokens.json").read_text())
    params = {"temperature": 0.0, "max_tokens": recorded["max_tokens"], "extra_args": recorded["options"]}
    return recorded["models"][name][: SIZES.num_cases], params


def check_bundled(stage: str) -> None:
    """A bundled model in float32: tokens of the CPU, tasks with two policies, every policy and cache, sampling."""
    from vllm import SamplingParams

    from vllm_osdt.demo import CALIBRATION_SEED, run_policy
    from vllm_osdt.mini import model_path
    from vllm_osdt.mini.tasks import TASKS, generate
    from vllm_osdt.options import DecodingOptions

    name = stage.split(":")[1]
    config = {"osdt": {"profile_dir": "", **({"statistic": "q1"} if IS_STAND_IN else {})}}
    llm = start_engine(stage, model_path(name), dtype="float32", max_model_len=512, additional_config=config)
    with part(stage, "tokens as on a CPU") as found:
        cases, params = recorded_on_cpu(name)
        outputs = llm.generate([case["prompt"] for case in cases], SamplingParams(**params), use_tqdm=False)
        differ = [i for i, case in enumerate(cases) if list(outputs[i].outputs[0].token_ids) != case["tokens"]]
        found |= {"num_cases": len(cases), "differ": differ}
        assert not differ
    if IS_STAND_IN:
        return
    for task in list(TASKS)[: SIZES.num_tasks]:
        with part(stage, "task", task=task) as found:
            problems = generate(task, "held_out", SIZES.num_problems, 0)
            calibrating = generate(task, "held_out", DecodingOptions().num_calibration_requests, CALIBRATION_SEED)
            run_policy(llm, task, "OSDT", calibrating, None)
            for policy in ("static 0.9", "OSDT"):
                row = run_policy(llm, task, policy, problems, None)
                found[policy] = {
                    "accuracy": row.accuracy,
                    "nfe": round(row.nfe, 2),
                    "tokens_per_s": round(row.tokens_per_second),
                }
    with part(stage, "a sample depends on its seed alone"):
        params = SamplingParams(temperature=0.8, seed=3, max_tokens=64, ignore_eos=True)
        outputs = llm.generate([PROMPT], params, use_tqdm=False) + llm.generate([PROMPT] * 16, params, use_tqdm=False)
        assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    for cache in ("none", "prefix", "dual") if name == "llada-mini" else (None,):
        for policy in ("static_threshold", "fixed_steps", "factor", "joint_bound", "entropy_bound", "bacd"):
            with part(stage, "policy", policy=policy, cache_mode=cache) as found:
                extra = {"osdt_policy": policy, **({"osdt_cache_mode": cache} if cache else {})}
                params = SamplingParams(temperature=0.0, max_tokens=64, extra_args=extra)
                completion = llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0]
                found["nfe"] = sum(completion.spec_decode_metrics.histogram)


def check_defaults(stage: str) -> None:
    """A bundled model with vLLM's and our own default settings: what most users start."""
    from vllm import SamplingParams

    from vllm_osdt.mini import model_path

    name = stage.split(":")[1]
    llm = start_engine(stage, model_path(name))
    with part(stage, "a batch") as found:
        cases, params = recorded_on_cpu(name)
        outputs = llm.generate([case["prompt"] for case in cases], SamplingParams(**params), use_tqdm=False)
        same = [list(outputs[i].outputs[0].token_ids) == case["tokens"] for i, case in enumerate(cases)]
        found["same_as_float32_on_cpu"] = sum(same) / len(same)
        assert any(same)


def check_recorded(stage: str) -> None:
    """The recorded decisions of a family in float32, in one batch and one by one."""
    from tests.e2e.engine import generate
    from tests.e2e.families import FAMILIES

    name = stage.split(":")[1]
    family = FAMILIES[name]
    folder = ROOT / "tests" / "golden" / name
    cases = json.loads((folder / "cases.json").read_text())[: SIZES.num_cases]
    settings = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 256, **family.settings}
    settings["additional_config"] = {"osdt": {"profile_dir": ""}}
    llm = start_engine(stage, folder, **settings)
    groups = {"one batch": [cases], "one by one": [[case] for case in cases[::4]]}
    for what, batches in groups.items():
        with part(stage, what) as found:
            differ = []
            for batch in batches:
                prompts, params = [case["prompt_token_ids"] for case in batch], [family.params_of(c) for c in batch]
                completions = generate(llm, prompts, params)
                differ += [
                    cases.index(case)
                    for case, completion in zip(batch, completions, strict=True)
                    if list(completion.token_ids) != case["output_token_ids"]
                ]
            found |= {"num_cases": sum(map(len, batches)), "differ": differ}
            assert not differ


# ---------------------------------------------------------------- large shapes

SHAPES: dict[str, dict[str, Any]] = {
    "llada-8b": {
        "architectures": ["LLaDAModelLM"], "model_type": "llada", "torch_dtype": "bfloat16", "activation_type": "silu",
        "alibi": False, "block_type": "llama", "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32,
        "mlp_hidden_size": 12288, "embedding_size": 126464, "vocab_size": 126464, "layer_norm_type": "rms",
        "rms_norm_eps": 1e-5, "rope": True, "rope_theta": 500000.0, "max_sequence_length": 4096,
        "mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081, "weight_tying": False,
        "include_bias": False, "include_qkv_bias": False, "block_length": 32,
    },
    "sdar-4b": {
        "architectures": ["SDARForCausalLM"], "model_type": "sdar", "torch_dtype": "bfloat16", "attention_bias": False,
        "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": False, "use_sliding_window": False,
        "vocab_size": 151936, "mask_token_id": 151669, "eos_token_id": 151643, "pad_token_id": 151643, "block_size": 4,
    },
}  # fmt: skip


class Clock:
    """Time of the calls that it wraps: on the host, and on the device between two events."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Any, Any]] = []
        self.host_s = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""
        import torch

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = function(*args, **kwargs)
            end.record()
            self.pairs.append((begin, end))
            self.host_s += time.perf_counter() - start
            return result

        return timed

    def take(self) -> tuple[float, float]:
        """Milliseconds on the device and on the host since the last call; waits for the device."""
        import torch

        torch.cuda.synchronize()
        device_ms, host_ms = sum(begin.elapsed_time(end) for begin, end in self.pairs), self.host_s * 1e3
        self.pairs, self.host_s = [], 0.0
        return device_ms, host_ms


def spread(values: Sequence[float]) -> dict[str, float]:
    """First decile, median and ninth decile, rounded."""
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return {"p10": round(deciles[0], 2), "median": round(deciles[4], 2), "p90": round(deciles[8], 2)}


def submit(llm: Any, number: int, prompt_length: int, max_tokens: int, policy: dict[str, Any]) -> None:
    """Queue requests with random prompts."""
    import numpy as np
    from vllm import SamplingParams

    rng = np.random.default_rng(0)
    params = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, extra_args=policy
    )
    for index in range(number):
        prompt = {"prompt_token_ids": rng.integers(10, 500, prompt_length).tolist()}
        llm.llm_engine.add_request(f"{time.monotonic_ns()}-{index}", prompt, params)


def finish(llm: Any) -> None:
    """Run the engine until it has nothing left."""
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def check_shape(stage: str) -> None:
    """A large model with random weights in bfloat16: time of steps, memory, and what a step launches."""
    import torch

    name = stage.split(":")[1]
    config = SHAPES[name] | {key: value for key, value in SIZES.shape if key in SHAPES[name]}
    folder = OUT / f"config-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    block_length = config.get("block_length") or config["block_size"]
    policy = {"osdt_policy": "fixed_steps", "osdt_steps_per_block": max(1, block_length // 4)}
    max_tokens = SIZES.num_blocks * 32
    llm = start_engine(
        stage, folder, dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True, max_model_len=1024,
        max_num_seqs=max(SIZES.requests), max_num_batched_tokens=2048 if IS_STAND_IN else 16384,
        gpu_memory_utilization=0.85,
    )  # fmt: skip
    model, clock = runner_of(llm).model, Clock()
    model.forward = clock.wrap(model.forward)
    model.compute_logits = clock.wrap(model.compute_logits)
    for number in SIZES.requests:
        with part(stage, "burst", requests=number, prompt_length=SIZES.prompt_length, max_tokens=max_tokens) as found:
            submit(llm, number, SIZES.prompt_length, 32, policy)  # warms up
            finish(llm)
            torch.cuda.reset_peak_memory_stats()
            clock.take()
            submit(llm, number, SIZES.prompt_length, max_tokens, policy)
            step_ms, device_ms, host_ms = [], [], []
            begin = time.perf_counter()
            while llm.llm_engine.has_unfinished_requests():
                start = time.perf_counter()
                llm.llm_engine.step()
                step_ms.append((time.perf_counter() - start) * 1e3)
                on_device, on_host = clock.take()
                device_ms.append(on_device)
                host_ms.append(on_host)
            seconds = time.perf_counter() - begin
            outside = [step - max(device, host) for step, device, host in zip(step_ms, device_ms, host_ms, strict=True)]
            found |= {
                "tokens_per_s": round(number * max_tokens / seconds, 1),
                "forwards_per_s": round(len(step_ms) / seconds, 1),
                "step_ms": spread(step_ms),
                "model_device_ms": spread(device_ms),
                "model_host_ms": spread(host_ms),
                "outside_model_ms": spread(outside),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
                "reserved_gib": round(torch.cuda.memory_reserved() / 2**30, 2),
            }
    num_requests = SIZES.requests[min(1, len(SIZES.requests) - 1)]
    with part(stage, "calls of a step", requests=num_requests) as found:
        submit(llm, num_requests, SIZES.prompt_length, max_tokens, policy)
        found |= profile_steps(llm, name)
    finish(llm)
    if IS_STAND_IN:
        return
    with part(stage, "what makes the host wait", requests=num_requests) as found:
        submit(llm, num_requests, SIZES.prompt_length, max_tokens, policy)
        found["waits_in_6_steps"] = find_waits(llm, 6)
    finish(llm)


def profile_steps(llm: Any, name: str, num_steps: int = 6) -> dict[str, Any]:
    """What some steps call and launch, per step; writes a trace."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        llm.llm_engine.step()
    activities = [ProfilerActivity.CPU] + ([] if IS_STAND_IN else [ProfilerActivity.CUDA])
    with profile(activities=activities) as profiled:
        for _ in range(num_steps):
            llm.llm_engine.step()
        torch.cuda.synchronize()
    events = profiled.key_averages()
    wanted = (
        "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpyAsync", "cudaLaunchKernel",
        "cuLaunchKernelEx", "cuLaunchKernel", "cudaGraphLaunch", "cudaHostAlloc", "cudaMalloc", "aten::item",
        "aten::nonzero", "aten::copy_",
    )  # fmt: skip
    on_device = [event for event in events if getattr(event, "self_device_time_total", 0) > 0]
    on_device.sort(key=lambda event: -event.self_device_time_total)
    on_host = sorted(events, key=lambda event: -event.self_cpu_time_total)
    trace = OUT / f"trace-{name}.json"
    profiled.export_chrome_trace(str(trace))
    (OUT / f"{trace.name}.gz").write_bytes(gzip.compress(trace.read_bytes(), 6))
    trace.unlink()
    return {
        "num_per_step": {key: sum(e.count for e in events if e.key == key) / num_steps for key in wanted},
        "kernels_us": {e.key[:80]: round(e.self_device_time_total / num_steps, 1) for e in on_device[:20]},
        "host_us": {e.key[:60]: round(e.self_cpu_time_total / num_steps, 1) for e in on_host[:15]},
    }


def find_waits(llm: Any, num_steps: int) -> dict[str, int]:
    """The lines that make the host wait in some steps, as PyTorch's own check sees them."""
    import warnings

    import torch

    found: dict[str, int] = {}

    def note(message: Any, *others: Any) -> None:
        if "synchroniz" in str(message):
            frames = [frame for frame in traceback.extract_stack() if "vllm" in frame.filename]
            line = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"
            found[line] = found.get(line, 0) + 1

    llm.llm_engine.step()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(num_steps):
                llm.llm_engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


def check_kernel_tests(stage: str) -> None:
    """The tests of the kernels, which use a GPU where there is one."""
    import csrc_triton

    root = Path(csrc_triton.__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels"]
    with part(stage, "pytest tests/kernels") as found:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        found["tail"] = (done.stdout + done.stderr)[-400:]
        assert done.returncode == 0, f"status {done.returncode}"


# ---------------------------------------------------------------- driver


@dataclass(frozen=True)
class Stage:
    """A stage: its function, the seconds that it may take, and whether it may run beside the stages next to it."""

    check: Callable[[str], None]
    limit_s: float
    is_beside: bool = False


# In the order of importance. Nothing that is timed runs beside another.
STAGES = {
    "environment": Stage(check_environment, 90),
    "libraries": Stage(check_libraries, 90),
    "kernels": Stage(check_kernels, 150),
    "defaults:llada-mini": Stage(check_defaults, 150, is_beside=True),
    "defaults:sdar-mini": Stage(check_defaults, 150, is_beside=True),
    "bundled:llada-mini": Stage(check_bundled, 240, is_beside=True),
    "bundled:sdar-mini": Stage(check_bundled, 240, is_beside=True),
    "shape:llada-8b": Stage(check_shape, 150),
    "shape:sdar-4b": Stage(check_shape, 150),
    "recorded:llada_random": Stage(check_recorded, 150, is_beside=True),
    "recorded:llada_tasks": Stage(check_recorded, 150, is_beside=True),
    "recorded:dream_random": Stage(check_recorded, 150, is_beside=True),
    "recorded:sdar_random": Stage(check_recorded, 150, is_beside=True),
    "recorded:llada2_random": Stage(check_recorded, 150, is_beside=True),
    "recorded:fast_dllm_v2_random": Stage(check_recorded, 150, is_beside=True),
    "kernel-tests": Stage(check_kernel_tests, 200, is_beside=True),
}
MAX_BESIDE = 4  # stages at a time: each has an engine, and takes a core while that starts


def has_flash_attention_4() -> bool:
    """Whether what it is written in is there; vLLM looks for its source alone, and chooses it for diffusion models."""
    return importlib.util.find_spec("cutlass") is not None


def run_stage(name: str) -> None:
    """The process of a stage."""
    if IS_STAND_IN:
        from tests.cuda_stand_in import cuda

        cuda.install()
    elif not has_flash_attention_4():
        from vllm.vllm_flash_attn import flash_attn_interface

        flash_attn_interface.FA4_AVAILABLE = False  # FlashAttention 3 does it as well
    failed = True
    with part(name, "stage"):
        STAGES[name].check(name)
        failed = False
    sys.stdout.flush()
    os._exit(int(failed))  # an engine that goes takes seconds


def groups_of(names: Sequence[str]) -> list[list[str]]:
    """Names in order, those that may run beside each other together."""
    groups: list[list[str]] = []
    for name in names:
        last = groups[-1] if groups else []
        if last and len(last) < MAX_BESIDE and all(STAGES[one].is_beside for one in (name, *last)):
            last.append(name)
        else:
            groups.append([name])
    return groups


def run_group(names: Sequence[str], left_s: Callable[[], float]) -> None:
    """Run stages beside each other, each to its end or its limit."""
    running = []
    for name in names:
        if left_s() < MIN_SECONDS:
            emit(name, "not started: no time is left", ok=False)
            continue
        log = (OUT / f"log-{name.replace(':', '-')}.txt").open("w")
        command = [sys.executable, __file__, "--stage", name, *(["--stand-in"] if IS_STAND_IN else [])]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        running.append((name, time.monotonic(), process))
    for name, start, process in running:
        limit = min(start + STAGES[name].limit_s, time.monotonic() + left_s() - 5)
        try:
            status: int | str = process.wait(max(1.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = "stopped at its limit"
        emit(name, "ended", ok=status == 0, status=status, seconds=round(time.monotonic() - start, 1))


def main() -> int:
    """Run stages; returns 1 if a part of one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="no stage goes on longer")
    parser.add_argument("--stand-in", action="store_true", help="tiny sizes on the stand-in for CUDA")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    OUT.mkdir(parents=True, exist_ok=True)
    if options.stage:
        run_stage(options.stage)
    start = time.monotonic()
    first_line = len(RESULTS.read_text().splitlines()) if RESULTS.exists() else 0
    for names in groups_of(options.only or list(STAGES)):
        run_group(names, lambda: options.budget - (time.monotonic() - start))
    with (OUT / "logs.txt").open("w") as file:  # one file, where only a few come back from the machine
        for log in sorted(OUT.glob("log-*.txt")):
            file.write(f"######## {log.name}\n{log.read_text(errors='replace')[-400000:]}\n")
            log.unlink()
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()[first_line:]]
    failed = [line for line in lines if not line["ok"]]
    for line in lines:
        print("ok    " if line["ok"] else "FAILED", line["stage"], line["what"], line.get("error", ""))
    print(f"{len(lines) - len(failed)} of {len(lines)} parts in {time.monotonic() - start:.0f} s; {RESULTS}, {OUT}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
