"""Serve an adapter beside its base model: its requests belong to tasks of their own.

The adapter has random weights and is made here, so its answers mean nothing.

    python examples/lora.py
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from vllm import LLM
from vllm.lora.request import LoRARequest

import vllm_osdt
from vllm_osdt.mini import model_path

RANK, ALPHA = 8, 16
MODULES = ("q_proj", "v_proj")
PROMPT = "quiz : pick one beast . A saw B dog C plum . Answer:"


def write_random_adapter(checkpoint: Path, folder: Path, seed: int = 0) -> None:
    """Write an adapter of a checkpoint's query and value projections in PEFT's format."""
    generator, adapter = torch.Generator().manual_seed(seed), {}
    with safe_open(checkpoint / "model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118  not a dictionary
            module = name.removesuffix(".weight")
            if module.endswith(MODULES):
                num_out, num_in = weights.get_slice(name).get_shape()
                lora_a = torch.randn(RANK, num_in, generator=generator) / num_in**0.5
                lora_b = 0.2 * torch.randn(num_out, RANK, generator=generator)
                adapter[f"base_model.model.{module}.lora_A.weight"] = lora_a
                adapter[f"base_model.model.{module}.lora_B.weight"] = lora_b
    save_file(adapter, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": MODULES, "bias": "none"}))


def main() -> None:
    """Decode one prompt by the base model and by the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=model_path("llada-mini"), help="folder of a LLaDA checkpoint")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        write_random_adapter(Path(args.model), Path(folder))
        llm = LLM(args.model, enable_lora=True, max_lora_rank=RANK)
        params = vllm_osdt.sampling_params(task="quiz")
        for adapter in (None, LoRARequest("random", 1, folder)):
            [output] = llm.generate(PROMPT, params, lora_request=adapter, use_tqdm=False)
            print("task:", vllm_osdt.describe(output.outputs[0])["task"])
            print("text:", repr(output.outputs[0].text))


if __name__ == "__main__":  # vLLM starts its engine in a process of its own
    main()
