"""Decisions: bundled models against tokens of a CPU, and the recorded decisions of every family."""

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.engines import attention_of, start_engine
from benchmarks.gpu.lines import ROOT, part
from benchmarks.gpu.sizes import IS_STAND_IN, SIZES

PROMPT = "quiz : pick one tool . A cow B saw C fig . Answer:"
# Attention in float32: FlashAttention has none. The second takes no block-causal model (vllm_osdt.host.attention).
BACKENDS = ("TRITON_ATTN", "FLEX_ATTENTION")
POLICIES = ("static_threshold", "fixed_steps", "factor", "joint_bound", "entropy_bound", "bacd")


def recorded_on_cpu(name: str, options: str = "options") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What a CPU engine decoded with a bundled model, and with which sampling parameters.

    Args:
        name: Of the model.
        options: ``options`` of a static threshold, or ``calibrated_options``, of a task that the last case calibrates.
    """
    import tests.cuda_stand_in

    recorded = json.loads((Path(tests.cuda_stand_in.__file__).parent / "cpu_tokens.json").read_text())
    params = {"temperature": 0.0, "max_tokens": recorded["max_tokens"], "extra_args": recorded[options]}
    return recorded["models"][name], params


def check_bundled(stage: str) -> None:
    """A bundled model in float32: tokens of the CPU, tasks with two policies, every policy and cache, sampling."""
    from vllm import SamplingParams

    from vllm_osdt.demo import CALIBRATION_SEED, run_policy
    from vllm_osdt.engine.statistics import num_forwards
    from vllm_osdt.mini import gen_length_of, model_path, tasks_of
    from vllm_osdt.mini.tasks import generate
    from vllm_osdt.options import DEFAULTS

    name = stage.split(":")[1]
    shot = {"statistic": "q1", "num_calibration_requests": 1} if IS_STAND_IN else {}
    config = {"osdt": {"profile_dir": "", **shot}}
    num_calibrating = int(shot.get("num_calibration_requests", DEFAULTS["num_calibration_requests"]))
    llm = start_engine(stage, model_path(name), dtype="float32", max_model_len=512, additional_config=config)
    with part(stage, "tokens as on a CPU") as found:
        cases, params = recorded_on_cpu(name)
        cases = cases[: SIZES.num_cases]
        outputs = llm.generate([case["prompt"] for case in cases], SamplingParams(**params), use_tqdm=False)
        differ = [i for i, case in enumerate(cases) if list(outputs[i].outputs[0].token_ids) != case["tokens"]]
        found |= {"num_cases": len(cases), "differ": differ}
        assert not differ
    with part(stage, "tokens and forwards of OSDT as on a CPU") as found:
        cases, params = recorded_on_cpu(name, "calibrated_options")
        prompts, asked = [case["prompt"] for case in cases], SamplingParams(**params)
        llm.generate(prompts[-1:], asked, use_tqdm=False)
        completions = [output.outputs[0] for output in llm.generate(prompts, asked, use_tqdm=False)]
        said = [{"tokens": list(one.token_ids), "nfe": num_forwards(one)} for one in completions]
        differ = [i for i, case in enumerate(cases) if said[i] != case["calibrated"]]
        found |= {"num_cases": len(cases), "differ": differ}
        assert not differ
    length = gen_length_of(name)
    for task in list(tasks_of(name))[: SIZES.num_tasks]:
        with part(stage, "task", task=task) as found:
            problems = generate(task, "held_out", SIZES.num_problems, 0)
            calibrating = generate(task, "held_out", num_calibrating, CALIBRATION_SEED)
            run_policy(llm, task, "OSDT", calibrating, length, None)
            for policy in ("static 0.9", "OSDT"):
                row = run_policy(llm, task, policy, problems, length, None)
                found[policy] = {
                    "accuracy": row.accuracy,
                    "nfe": round(row.nfe, 2),
                    "tokens_per_s": round(row.tokens_per_second),
                }
    with part(stage, "a sample depends on its seed alone"):
        params = SamplingParams(temperature=0.8, seed=3, max_tokens=SIZES.max_tokens, ignore_eos=True)
        many = [PROMPT] * SIZES.num_samples
        outputs = llm.generate([PROMPT], params, use_tqdm=False) + llm.generate(many, params, use_tqdm=False)
        assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    for cache in ("none", "prefix", "dual") if name == "llada-mini" else (None,):
        for policy in POLICIES[: SIZES.num_policies]:
            with part(stage, "policy", policy=policy, cache_mode=cache) as found:
                extra = {"osdt_policy": policy, **({"osdt_cache_mode": cache} if cache else {})}
                params = SamplingParams(temperature=0.0, max_tokens=SIZES.max_tokens, extra_args=extra)
                completion = llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0]
                found["nfe"] = num_forwards(completion)


def check_defaults(stage: str) -> None:
    """A bundled model with vLLM's and our own default settings: what most users start."""
    from vllm import SamplingParams

    from vllm_osdt.mini import model_path

    name = stage.split(":")[1]
    llm = start_engine(stage, model_path(name))
    with part(stage, "a batch") as found:
        cases, params = recorded_on_cpu(name)
        cases = cases[: SIZES.num_cases]
        outputs = llm.generate([case["prompt"] for case in cases], SamplingParams(**params), use_tqdm=False)
        same = [list(outputs[i].outputs[0].token_ids) == case["tokens"] for i, case in enumerate(cases)]
        found["same_as_float32_on_cpu"] = sum(same) / len(same)
        assert any(same)


def check_recorded(stage: str) -> None:
    """The recorded decisions of a family in float32, in one batch and one by one, with every attention that may be."""
    from tests.e2e.families import FAMILIES

    name = stage.split(":")[1]
    family = FAMILIES[name]
    folder = ROOT / "tests" / "golden" / name
    cases = json.loads((folder / "cases.json").read_text())[: SIZES.num_cases]
    settings = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 256, **family.settings}
    settings["additional_config"] = {"osdt": {"profile_dir": ""}}
    llm = start_engine(stage, folder, **settings)
    _compare(stage, llm, family, cases, "one batch", [cases])
    _compare(stage, llm, family, cases, "one by one", [[case] for case in cases[::4]])
    is_block_causal = llm.llm_engine.vllm_config.model_config.hf_config.traits.is_block_causal
    for backend in BACKENDS[:1] if is_block_causal else BACKENDS:
        if backend not in attention_of(llm):
            other = start_engine(stage, folder, **settings, attention_backend=backend)
            _compare(stage, other, family, cases, "one batch", [cases])


def _compare(
    stage: str, llm: Any, family: Any, cases: list[dict[str, Any]], what: str, batches: list[list[dict[str, Any]]]
) -> None:
    """Decode recorded cases in batches; every token has to be the recorded one."""
    from tests.e2e.engine import generate

    with part(stage, what, attention=attention_of(llm)) as found:
        differ = []
        for batch in batches:
            prompts, params = [case["prompt_token_ids"] for case in batch], [family.params_of(case) for case in batch]
            completions = generate(llm, prompts, params)
            differ += [
                cases.index(case)
                for case, completion in zip(batch, completions, strict=True)
                if list(completion.token_ids) != case["output_token_ids"]
            ]
        found |= {"num_cases": sum(map(len, batches)), "differ": differ}
        assert not differ
