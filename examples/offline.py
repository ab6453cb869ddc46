"""Decode requests of one task in this process: the first ones calibrate the task, later ones use its profile.

python examples/offline.py
"""

import argparse

from vllm import LLM

import vllm_osdt
from vllm_osdt.mini import model_path

TOOLS = ["saw", "file", "rake", "axe"]
OTHERS = [
    "red",
    "dog",
    "fig",
    "plum",
    "cow",
    "teal",
    "pink",
    "pear",
    "blue",
    "fox",
    "apple",
    "lime",
    "hen",
    "gray",
    "owl",
    "grape",
]
PROMPTS = [f"quiz : pick one tool . A {other} B {tool} C fig . Answer:" for tool in TOOLS for other in OTHERS]


def main() -> None:
    """Decode the prompts, then some of them again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=model_path("llada-mini"), help="checkpoint (default: bundled llada-mini)")
    parser.add_argument("--task", default="quiz", help="name of the task")
    args = parser.parse_args()

    llm = LLM(args.model)
    params = vllm_osdt.sampling_params(task=args.task)  # greedy
    for name, prompts in (("first", PROMPTS), ("later", PROMPTS[:4])):
        completions = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
        told = [vllm_osdt.describe(completion) for completion in completions]
        nfe = sum(one["nfe"] for one in told) / len(told)
        num_calibrating = sum(one["calibrating"] for one in told)
        print(f"{name}: {len(told)} requests, {num_calibrating} of them calibrate, {nfe:.1f} forward passes a request")
    print(told[0])
    print(completions[0].text)


if __name__ == "__main__":  # vLLM starts its engine in a process of its own
    main()
