"""``vllm-osdt calibrate``: make a task's profile ahead of time."""

import argparse
import os

from vllm_osdt.cli.common import CommandError, find_profiles, read_lines
from vllm_osdt.options import DEFAULTS
from vllm_osdt.options.parsing import check_operator_values


def calibrate(args: argparse.Namespace) -> None:
    """Decode prompts until they have made the task's profile, and keep it."""
    prompts = read_lines(args.prompts, "prompt")
    options = check_operator_values(args.osdt_config)
    needed = options.num_calibration_requests
    if len(prompts) < needed:
        raise CommandError(
            f"{args.prompts} holds {len(prompts)} prompts, but num_calibration_requests is {needed}; give more "
            "prompts, or ask for fewer with --osdt-config (one request: "
            '{"num_calibration_requests": 1, "statistic": "q1"})'
        )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    from vllm_osdt import profiles
    from vllm_osdt.engine.statistics import num_forwards

    operator = {**args.osdt_config, "profile_dir": str(args.dir)}
    llm = LLM(
        model=args.model, dtype=args.dtype, max_model_len=args.max_model_len, additional_config={"osdt": operator}
    )
    extra = {"osdt_policy": "osdt", "osdt_task": args.task, "osdt_recalibrate": True}
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, extra_args=extra)
    args.dir.mkdir(parents=True, exist_ok=True)
    before = {(one.profile.profile_id, one.profile.created) for one in find_profiles(args.dir)}
    num_tokens = nfe = num_decoded = 0
    while len(prompts) - num_decoded > 0:  # more than needed where some do not count
        batch = prompts[num_decoded : num_decoded + needed]
        num_decoded += len(batch)
        for output in llm.generate(batch, params, use_tqdm=False):
            num_tokens += len(output.outputs[0].token_ids)
            nfe += num_forwards(output.outputs[0])
        found = [profile for profile in profiles(llm) if profile["task"] == args.task]
        made = [profile for profile in found if (profile["id"], profile["created"]) not in before]
        if made:
            number = made[0]["num_requests"]
            print(f"{made[0]['id']}  task {args.task}: {number} requests, {num_tokens} tokens in {nfe} forwards")
            if number < DEFAULTS["num_calibration_requests"]:
                print(f"a server uses it for requests with osdt_num_calibration_requests = {number} or fewer")
            return
    raise CommandError(f"none of the {len(prompts)} prompts made a profile; --max-tokens must be at least one block")
