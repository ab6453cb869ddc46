"""Pin a calibration profile by its id: a request decodes as before, although its task has a newer profile.

python examples/pinned_profile.py
"""

import argparse
import tempfile

from vllm import LLM

import vllm_osdt
from vllm_osdt.mini import model_path

PROMPT = "quiz : pick one beast . A saw B dog C plum . Answer:"
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
EASY = [f"quiz : pick one tool . A {other} B {tool} C fig . Answer:" for tool in TOOLS for other in OTHERS]
LONG = [f"quiz : pick one tool . A {other} B cow C {tool} D pig E red . Answer:" for tool in TOOLS for other in OTHERS]


def main() -> None:
    """Calibrate a task twice, and decode one prompt by the newer and by the older profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=model_path("llada-mini"), help="checkpoint (default: bundled llada-mini)")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:  # where the profiles are kept, as --osdt-config says it
        llm = LLM(args.model, additional_config={"osdt": {"profile_dir": folder}})

        def decode(name: str, **options: str) -> tuple[str, str]:
            """Decode the prompt; returns the profile's id and the text."""
            params = vllm_osdt.sampling_params(task="quiz", **options)
            [output] = llm.generate(PROMPT, params, use_tqdm=False)
            told = vllm_osdt.describe(output.outputs[0])
            print(f"{name}: profile {told['profile']}, {told['nfe']} forward passes")
            return told["profile"], output.outputs[0].text

        llm.generate(EASY, vllm_osdt.sampling_params(task="quiz"), use_tqdm=False)
        first, before = decode("first")
        llm.generate(LONG, vllm_osdt.sampling_params(task="quiz", recalibrate=True), use_tqdm=False)
        newer, _ = decode("newer")
        pinned, after = decode("pinned", profile=first)
        print("the task has a newer profile:", newer != first)
        print("the pinned request decodes as before:", (pinned, after) == (first, before))


if __name__ == "__main__":  # vLLM starts its engine in a process of its own
    main()
