"""Runs stock Fast-dLLM v1 (NVlabs/Fast-dLLM, LLaDA) for ``bench_vs_fast_dllm.py``, in Fast-dLLM's own environment.

Loads the model once, then decodes the prompts of each request on standard input, one after another. Modelling code
and decoders come from the user's checkout, unmodified; none of it is part of this package.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import serve, versions

# Where v1's LLaDA code is, in newer and in older checkouts.
FOLDERS = ("v1/llada", "llada")
GENERATE = {
    "none": "generate",
    "prefix": "generate_with_prefix_cache",
    "dual": "generate_with_dual_cache",
}


def source_folder(checkout: str | Path) -> Path:
    """The folder of a Fast-dLLM checkout that has LLaDA's decoders.

    Raises:
        FileNotFoundError: It has none.
    """
    for folder in FOLDERS:
        path = Path(checkout) / folder
        if (path / "generate.py").exists() and (path / "model" / "modeling_llada.py").exists():
            return path
    raise FileNotFoundError(
        f"{checkout} has no generate.py in {' or '.join(FOLDERS)}; expected a checkout of NVlabs/Fast-dLLM."
    )


def start(config: dict[str, Any]) -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    """Load the model.

    Args:
        config: ``checkout``, ``model``, ``mask_token_id``, ``dtype``, ``threads``, ``cache``, ``threshold``,
            ``gen_length``, ``block_length``.
    """
    sys.path.insert(0, str(source_folder(config["checkout"])))
    import torch

    torch.set_num_threads(config["threads"])
    modeling = importlib.import_module("model.modeling_llada")
    decode = getattr(importlib.import_module("generate"), GENERATE[config["cache"]])
    model = modeling.LLaDAModelLM.from_pretrained(config["model"], torch_dtype=getattr(torch, config["dtype"]))
    model = model.eval()
    gen_length = config["gen_length"]

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        outputs, nfe = [], []
        begin, cpu_begin = time.perf_counter(), time.process_time()
        for prompt in request["prompts"]:
            canvas, num_forwards = decode(
                model,
                torch.tensor([prompt]),
                steps=gen_length,
                gen_length=gen_length,
                block_length=config["block_length"],
                temperature=0.0,
                remasking="low_confidence",
                mask_id=config["mask_token_id"],
                threshold=config["threshold"],
            )
            outputs.append(canvas[0, len(prompt) :].tolist())
            nfe.append(num_forwards)
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "outputs": outputs, "nfe": nfe}

    hello = {
        "versions": versions(("torch", "transformers", "numpy")),
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    return hello, answer


if __name__ == "__main__":
    serve(lambda: start(json.loads(sys.argv[1])))
