"""Decodes recorded cases and calibrates a task on two ranks; writes the outcome as JSON."""

import json
import sys
from pathlib import Path


def main(folder: Path, outcome: Path) -> None:
    from vllm import LLM

    import vllm_osdt
    from tests.e2e.engine import case_params, generate, sampling, tokens

    cases = json.loads((folder / "cases.json").read_text())
    prompts = [case["prompt_token_ids"] for case in cases]
    llm = LLM(
        model=str(folder), skip_tokenizer_init=True, dtype="float32", max_num_seqs=32, max_model_len=512,
        tensor_parallel_size=2, additional_config={"osdt": {"profile_dir": str(outcome.parent), "max_profiles": 1}},
    )  # fmt: skip
    decided = tokens(generate(llm, prompts, [case_params(case) for case in cases]))
    held = []
    for task in ("shared", "other", "shared"):  # the last comes from disk, by way of the first rank
        generate(llm, prompts[:2], sampling(64, task=task, num_calibration_requests=2, statistic="q1"))
        held.append(vllm_osdt.profiles(llm))
    # Both ranks are given the table that the engine core has read; its requests decode as they do on one rank.
    calibrated = generate(llm, prompts[:2], sampling(64, task="shared", num_calibration_requests=2, statistic="q1"))
    used = [vllm_osdt.describe(completion)["profile"] for completion in calibrated]
    llm.collective_rpc("reload_weights")
    again = generate(llm, prompts[:2], sampling(64, task="shared", num_calibration_requests=2, statistic="q1"))
    reloaded = {
        "updates": [num_updates for num_updates, _ in llm.collective_rpc("held_weights")],
        "versions": [vllm_osdt.describe(completion)["weights_version"] for completion in calibrated + again],
        "same": tokens(again) == tokens(calibrated),
        "used": [vllm_osdt.describe(completion)["profile"] for completion in again],
    }
    result = {"decided": decided, "held": held, "used": used, "calibrated": tokens(calibrated), "reloaded": reloaded}
    outcome.write_text(json.dumps(result))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
