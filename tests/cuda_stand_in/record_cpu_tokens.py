"""Records what the bundled models decode on a CPU in float32: run in the ordinary environment, from the repository.

python -m tests.cuda_stand_in.record_cpu_tokens
"""

import json
import os
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

MODELS = ("llada-mini", "sdar-mini")
OPTIONS = {"osdt_policy": "static_threshold", "osdt_threshold": 0.9}
NUM_PROBLEMS, MAX_TOKENS, SEED = 2, 32, 7


def main() -> None:
    """Write ``cpu_tokens.json`` beside this file."""
    from vllm import LLM, SamplingParams

    from vllm_osdt.mini import model_path
    from vllm_osdt.mini.tasks import TASKS, generate

    prompts = [problem.prompt for task in TASKS for problem in generate(task, "held_out", NUM_PROBLEMS, SEED)]
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, extra_args=OPTIONS)
    engines, recorded = [], {}
    for model in MODELS:
        engines.append(LLM(model_path(model), dtype="float32", max_model_len=256, kv_cache_memory_bytes=2**28))
        outputs = engines[-1].generate(prompts, params, use_tqdm=False)
        recorded[model] = [
            {
                "prompt": prompt,
                "tokens": list(output.outputs[0].token_ids),
                "nfe": sum(output.outputs[0].spec_decode_metrics.histogram),
            }
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
    text = json.dumps({"max_tokens": MAX_TOKENS, "options": OPTIONS, "models": recorded}, indent=1)
    Path(__file__).with_name("cpu_tokens.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
