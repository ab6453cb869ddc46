"""Records what the bundled models decode on a CPU in float32: run in the ordinary environment, from the repository.

python -m tests.cuda_stand_in.record_cpu_tokens
"""

import json
import os
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

MODELS = ("llada-mini", "sdar-mini")
OPTIONS = {"osdt_policy": "static_threshold", "osdt_threshold": 0.9}
# The last prompt calibrates, as in the paper; then all have its thresholds.
CALIBRATED = {
    "osdt_policy": "osdt",
    "osdt_task": "recorded",
    "osdt_statistic": "q1",
    "osdt_num_calibration_requests": 1,
}
NUM_PROBLEMS, MAX_TOKENS, SEED = 2, 32, 7


def said(output: Any) -> dict[str, Any]:
    """What is recorded of a request."""
    completion = output.outputs[0]
    return {"tokens": list(completion.token_ids), "nfe": sum(completion.spec_decode_metrics.histogram)}


def main() -> None:
    """Write ``cpu_tokens.json`` beside this file."""
    from vllm import LLM, SamplingParams

    from vllm_osdt.mini import model_path
    from vllm_osdt.mini.tasks import TASKS, generate

    prompts = [problem.prompt for task in TASKS for problem in generate(task, "held_out", NUM_PROBLEMS, SEED)]
    static, calibrated = (
        SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, extra_args=options) for options in (OPTIONS, CALIBRATED)
    )
    engines, recorded = [], {}
    for model in MODELS:
        settings = {"dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 2**28}
        engines.append(LLM(model_path(model), **settings, additional_config={"osdt": {"profile_dir": ""}}))
        outputs = engines[-1].generate(prompts, static, use_tqdm=False)
        engines[-1].generate(prompts[-1:], calibrated, use_tqdm=False)
        of_task = engines[-1].generate(prompts, calibrated, use_tqdm=False)
        recorded[model] = [
            {"prompt": prompt, **said(output), "calibrated": said(other)}
            for prompt, output, other in zip(prompts, outputs, of_task, strict=True)
        ]
    found = {"max_tokens": MAX_TOKENS, "options": OPTIONS, "calibrated_options": CALIBRATED, "models": recorded}
    text = json.dumps(found, indent=1)
    Path(__file__).with_name("cpu_tokens.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
