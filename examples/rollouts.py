"""A loop of reinforcement learning: sample answers, keep what a policy gradient needs, update the weights, go on.

python examples/rollouts.py
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from vllm import LLM

import vllm_osdt
from vllm_osdt.mini import model_path
from vllm_osdt.mini.tasks import check, generate


def rollouts(llm: LLM, problems: list, samples: int, seed: int) -> list[dict]:
    """Sampled answers: tokens, log probability and denoising step of each token, reward, and whose weights they are."""
    params = vllm_osdt.sampling_params(
        n=samples, temperature=1.0, seed=seed, max_tokens=96, policy="static_threshold", logprobs=0, return_trace=True
    )
    found = []
    for problem, output in zip(problems, llm.generate([one.prompt for one in problems], params), strict=True):
        for answer in output.outputs:
            token_ids, about = list(answer.token_ids), vllm_osdt.describe(answer)
            logprobs = [place[token].logprob for place, token in zip(answer.logprobs, token_ids, strict=True)]
            reward = float(check(problem, answer.text))
            step_map = about["trace"]["step"]
            found.append(
                dict(token_ids=token_ids, logprobs=logprobs, step_map=step_map, reward=reward)
                | {"weights_version": about["weights_version"]}
            )
    return found


def train(folder: Path, batch: list[dict]) -> None:
    """Stands for a trainer: moves the weights by chance where yours takes a gradient of the batch."""
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(len(batch))
    save_file({name: one + 0.02 * one.std() * torch.randn_like(one) for name, one in weights.items()},
              folder / "model.safetensors")  # fmt: skip


def main() -> None:
    """Three batches, with an update of the weights after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=model_path("llada-mini"), help="checkpoint (default: bundled llada-mini)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(args.model, Path(temporary) / "model")
        llm = LLM(str(folder), dtype="float32")
        for step in range(3):
            batch = rollouts(llm, generate("code", "train", 4, seed=step), samples=4, seed=step)
            versions = {one["weights_version"] for one in batch}
            reward = sum(one["reward"] for one in batch) / len(batch)
            print(f"batch {step}: {len(batch)} answers of weights {versions}, reward {reward:.2f}")
            train(folder, batch)
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
    print("first answer:", {name: value[:4] for name, value in batch[0].items() if isinstance(value, list)})


if __name__ == "__main__":
    main()
