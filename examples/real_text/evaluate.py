"""How a checkpoint writes: its teacher's NLL of the text, repetition, tokens per forward pass, by decoding rule."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from examples.real_text import base
from examples.real_text.decode import ONE_PER_STEP, Decoded, decode
from examples.real_text.model import Llama

THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
AUTOREGRESSIVE, ONE = "autoregressive base", "one token per step"
MIN_PROMPTS, MIN_TOKENS_PER_FORWARD, MAX_NLL_RATIO = 50, 1.5, 1.2  # the gate
NUM_CALIBRATION_REQUESTS = 32  # the plugin's default
OSDT = {  # the plugin's default, and the paper's setting
    "osdt": {},
    "osdt, paper": {"num_calibration_requests": 1, "statistic": "q1", "threshold_cap": 0.8, "slack": 0.2},
}


def distinct(outputs: Iterable[list[int]], n: int) -> float:
    """Different n-grams of a text per n-gram, the mean of the texts; loops are far below 1."""
    grams = [list(zip(*(tokens[start:] for start in range(n)), strict=False)) for tokens in outputs]
    shares = [len(set(one)) / len(one) for one in grams if one]
    return sum(shares) / len(shares) if shares else 0.0


def line_of(teacher: Llama, prompts: list[list[int]], rule: str, decoded: list[Decoded]) -> dict[str, Any]:
    """What is told of a rule."""
    outputs = [one.tokens for one in decoded]
    num_tokens = sum(map(len, outputs))
    return {
        "rule": rule,
        "num_prompts": len(prompts),
        "num_tokens": num_tokens,
        "tokens_per_forward": num_tokens / sum(one.nfe for one in decoded),
        "nll_per_token": sum(base.nll(teacher, prompts, outputs)) / num_tokens,
        "distinct_1": distinct(outputs, 1),
        "distinct_2": distinct(outputs, 2),
    }


def evaluate(teacher: Llama, adapted: Llama, prompts: list[list[int]], max_tokens: int) -> list[dict[str, Any]]:
    """Decodes the prompts greedily: the teacher token by token, the adapted model at every threshold."""
    rules = {ONE: ONE_PER_STEP, **{f"static {threshold}": threshold for threshold in THRESHOLDS}}
    decoded = {AUTOREGRESSIVE: decode(teacher, prompts, max_tokens=max_tokens, block_length=1)}
    for rule, threshold in rules.items():
        block_length = adapted.config.block_length
        decoded[rule] = decode(adapted, prompts, max_tokens=max_tokens, block_length=block_length, threshold=threshold)
    return [line_of(teacher, prompts, rule, one) for rule, one in decoded.items()]


def passes_gate(lines: list[dict[str, Any]]) -> bool:
    """Whether the model is worth measuring: fast enough at 0.9, and as good a text token by token."""
    by_rule = {line["rule"]: line for line in lines}
    fast, one, before = (by_rule[rule] for rule in ("static 0.9", ONE, AUTOREGRESSIVE))
    return (
        fast["num_prompts"] >= MIN_PROMPTS
        and fast["tokens_per_forward"] >= MIN_TOKENS_PER_FORWARD
        and one["nll_per_token"] <= MAX_NLL_RATIO * before["nll_per_token"]
    )


def report(lines: list[dict[str, Any]]) -> None:
    """Prints a table and whether the gate is met."""
    print(f"{'rule':<24}{'prompts':>8}{'tokens':>8}{'per forward':>12}{'NLL':>7}{'distinct-1':>11}{'distinct-2':>11}")
    for line in lines:
        rule, num_prompts, num_tokens, *rest = line.values()
        print("{:<24}{:>8}{:>8}{:>12.2f}{:>7.2f}{:>11.2f}{:>11.2f}".format(rule, num_prompts, num_tokens, *rest))
    asked = (
        f"at least {MIN_TOKENS_PER_FORWARD} tokens a forward at static 0.9, NLL of {ONE} within "
        f"{MAX_NLL_RATIO - 1:.0%} of {AUTOREGRESSIVE}, {MIN_PROMPTS} prompts or more"
    )
    print(f"gate {'met' if passes_gate(lines) else 'NOT met'}: {asked}")


def decode_with_vllm(
    folder: Path, prompts: list[list[int]], others: list[list[int]], max_tokens: int
) -> dict[str, list[Decoded]]:
    """The same requests through this plugin, with static thresholds and with OSDT that `others` have calibrated."""
    from vllm import LLM

    import vllm_osdt

    llm = LLM(str(folder), max_model_len=1024, additional_config={"osdt": {"profile_dir": ""}})
    rules: dict[str, dict[str, Any]] = {
        f"static {t}": {"policy": "static_threshold", "threshold": t} for t in THRESHOLDS
    }
    rules |= {rule: {"task": rule, **options} for rule, options in OSDT.items()}
    found = {}
    for rule, options in rules.items():
        params = vllm_osdt.sampling_params(max_tokens=max_tokens, **options)
        asked, num_before = [{"prompt_token_ids": prompt} for prompt in others + prompts], len(others)
        if "task" in options:
            llm.generate(asked[: options.get("num_calibration_requests", num_before)], params, use_tqdm=False)
        completions = [output.outputs[0] for output in llm.generate(asked[num_before:], params, use_tqdm=False)]
        told = [vllm_osdt.describe(one) or {} for one in completions]
        found[f"vLLM, {rule}"] = [Decoded(list(c.token_ids), t["nfe"]) for c, t in zip(completions, told, strict=True)]
    return found


def main() -> None:
    """Decodes the held-out prompts of a run through vLLM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--cache", type=Path, default=base.CACHE, help="folder of the base model")
    parser.add_argument("--num-prompts", type=int, default=64, help="as many as the run held out, or fewer")
    parser.add_argument("--max-tokens", type=int, default=128)
    options = parser.parse_args()
    teacher, _ = base.load(options.cache)
    prompts = json.loads((options.out / "prompts.json").read_text())
    prompts, others = prompts[: options.num_prompts], prompts[options.num_prompts :][:NUM_CALIBRATION_REQUESTS]
    for rule, decoded in decode_with_vllm(options.out / "model", prompts, others, options.max_tokens).items():
        print(json.dumps(line_of(teacher, prompts, rule, decoded)), flush=True)


if __name__ == "__main__":
    main()
