"""The whole recipe: `python -m examples.real_text --out DIR [--device cuda] [--minutes 8] [--small]`."""

import argparse
import json
import random
import time
from pathlib import Path

import torch

from examples.real_text import base
from examples.real_text.adapt import adapt, sample
from examples.real_text.evaluate import evaluate, report
from examples.real_text.export import apply_adapter, export, save_adapter
from examples.real_text.prompts import collect

ADAPTER_RANK = 32  # of the file; 19.7 MB
SAMPLING_SHARE, TRAINING_SHARE = 0.25, 0.5  # of the time; evaluation takes what it needs
FULL = {
    "num_prompts": 20_000,
    "max_prompt_tokens": 192,
    "max_tokens": 192,
    "sampling_batch": 512,
    "training_batch": 32,
    "max_steps": 100_000,
    "num_held_out": 64,
    "evaluated_tokens": 128,
}
SMALL = dict(zip(FULL, (24, 64, 24, 24, 2, 16, 4, 16), strict=True))  # shows that every stage runs, and nothing else


def main() -> None:
    """Runs the stages; what the output folder has already is not made again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--cache", type=Path, default=base.CACHE, help="folder of the base model, filled if empty")
    parser.add_argument(
        "--prompts", type=Path, help="JSON lines with a prompt or question each, used beside docstrings"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="for sampling, training and evaluation together")
    parser.add_argument("--small", action="store_true", help="a few samples and steps, with LoRA: a trial on a CPU")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train matrices of this rank; 0: all weights")
    parser.add_argument("--learning-rate", type=float, help="default: 1e-3 with LoRA, 2e-4 without")
    parser.add_argument("--adapter", type=Path, help="take this file instead of training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    size = SMALL if options.small else FULL
    rank = options.lora if options.lora is not None else ADAPTER_RANK if options.small else 0
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()

    def say(stage: str) -> None:
        print(f"[{time.monotonic() - begin:6.1f} s] {stage}", flush=True)

    (teacher, tokenizer), (adapted, _) = (base.load(options.cache, options.device) for _ in range(2))
    say("base model loaded")
    if not (out / "prompts.json").exists():
        texts = collect(size["num_prompts"] + size["num_held_out"], options.seed, options.prompts)
        encoded = [one.ids for one in tokenizer.encode_batch(texts)]
        fitting = [ids for ids in encoded if len(ids) <= size["max_prompt_tokens"]]
        (out / "prompts.json").write_text(json.dumps(fitting))
    prompts = json.loads((out / "prompts.json").read_text())
    held_out, prompts = prompts[: size["num_held_out"]], prompts[size["num_held_out"] :]
    say(f"{len(prompts)} prompts, {len(held_out)} more held out")

    seconds = 60 * options.minutes
    if options.adapter is not None:
        apply_adapter(adapted, options.adapter)
    else:
        path, length, batch = out / "samples.json", size["max_tokens"], size["sampling_batch"]
        if not path.exists():
            pairs = sample(teacher, prompts, max_tokens=length, batch=batch, seconds=SAMPLING_SHARE * seconds)
            path.write_text(json.dumps(pairs))
        pairs = json.loads(path.read_text())
        say(f"{len(pairs)} samples of {sum(len(output) for _, output in pairs)} tokens")
        steps = {"batch": size["training_batch"], "max_steps": size["max_steps"], "seconds": TRAINING_SHARE * seconds}
        rate = options.learning_rate or (1e-3 if rank else 2e-4)
        adapt(adapted, pairs, out, rank=rank, learning_rate=rate, seed=options.seed, **steps)
        say("trained")
        path = out / "adapter.safetensors"
        left_out = save_adapter(teacher, adapted, path, ADAPTER_RANK)
        say(f"adapter: {path.stat().st_size / 1e6:.1f} MB, leaves out {left_out:.1%} of the change")
    export(adapted, tokenizer, out / "model")
    say(f"exported to {out / 'model'}")
    lines = evaluate(teacher, adapted, held_out, size["evaluated_tokens"])
    (out / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report(lines)
    say("done")


if __name__ == "__main__":
    main()
