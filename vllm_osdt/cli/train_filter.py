"""``vllm-osdt train-filter``: make the network of the policy ``learned_filter`` from a calibration's record.

Source: Learning to Parallel (arXiv 2509.25188), section 4: confidences of a block go in, whether each proposal is the
final token comes out; binary cross-entropy, AdamW at a rate of 0.003, as in the authors' code. The final tokens are
those of the calibrating requests.
"""

import argparse
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vllm_osdt.calibration.recording import Recording
from vllm_osdt.cli.common import CommandError, one_profile
from vllm_osdt.options import DEFAULTS
from vllm_osdt.policies.learned_filter import NAMES, NO_LOGITS

if TYPE_CHECKING:
    import torch

RATE = 0.003  # of AdamW
BATCH = 1024  # steps of one update
HELD_OUT = 0.1  # share of the requests that say when training ends
LOOKS_EVERY = 50  # updates
MIN_REQUESTS = 10


class Samples(NamedTuple):
    """Denoising steps of calibrating requests, S of them, blocks of B positions.

    Attributes:
        confidence: float32 ``[S, B]``, 1 where there is none.
        is_final: bool ``[S, B]``, whether the proposal is the token that stood there in the end.
        is_known: bool ``[S, B]``, masked positions that got a token in the end.
        request: int64 ``[S]``, whose step it is.
    """

    confidence: np.ndarray
    is_final: np.ndarray
    is_known: np.ndarray
    request: np.ndarray

    def of(self, chosen: np.ndarray) -> "Samples":
        """Some of the steps."""
        return Samples(*(one[chosen] for one in self))


def train_filter(args: argparse.Namespace) -> None:
    """Train the filter of the policy learned_filter on the records of profiles, and write it to a file."""
    found = [one_profile(args, name) for name in args.profiles]
    lengths = {one.profile.key.block_length for one in found}
    if len(lengths) > 1 or len({one.fingerprint for one in found}) > 1:
        raise CommandError(f"the profiles are of several models or block lengths ({lengths}); a filter is for one each")
    if any(one.profile.key.num_positions > one.profile.key.block_length for one in found):
        raise CommandError("a profile was made with adablock, and a filter is for blocks of one length; name another")
    samples = samples_of([one.profile.record for one in found])
    num_requests = np.unique(samples.request).size
    if num_requests < MIN_REQUESTS:
        raise CommandError(
            f"the profiles have {num_requests} requests, too few to train on; calibrate with at least {MIN_REQUESTS}"
        )
    threshold = DEFAULTS["filter_threshold"]
    weights, outcome = train(samples, threshold, args.seed, args.max_updates)
    about = {
        "block_length": lengths.pop(),
        "profiles": [one.profile.profile_id for one in found],
        "requests": num_requests,
        "steps": samples.request.size,
        **outcome,
    }
    from safetensors.torch import save

    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(save(weights, metadata={name: json.dumps(value) for name, value in about.items()}))
    if args.json:
        print(json.dumps({"file": str(args.out), **about}, indent=2))
        return
    print(
        f"{args.out}: a filter for blocks of {about['block_length']}, from {about['steps']} steps of {num_requests} "
        f"requests; {about['updates']} updates, held-out loss {about['loss']:.4f}\n"
        f"of held-out proposals {about['final']:.1%} were final; with filter_threshold {threshold:g} "
        f"{about['passing']:.1%} pass, {about['wrong']:.2%} of these wrongly"
    )


def samples_of(records: list[Recording]) -> Samples:
    """The steps of recorded requests; the same text may have several.

    Args:
        records: ``[requests, blocks, steps, B]`` each.
    """
    parts, first = [], 0
    for record in records:
        is_masked = ~np.isnan(record.confidence)
        gets_token = record.committed.any(axis=2, keepdims=True)  # else it is behind the end of the answer
        request, *rest = np.nonzero(is_masked.any(axis=3))
        at = (request, *rest)
        confidence = np.where(is_masked, record.confidence, NO_LOGITS)[at]
        parts.append(Samples(confidence, ~record.wrong[at], (is_masked & gets_token)[at], request + first))
        first += len(record.confidence)
    return Samples(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def train(
    samples: Samples, threshold: float, seed: int, max_updates: int
) -> "tuple[dict[str, torch.Tensor], dict[str, Any]]":
    """Weights by name, those with the lowest loss on held-out requests, and what these say.

    Args:
        samples: At least two requests'.
        threshold: For the outcome: what a proposal must exceed.
        seed: Of the first weights, batches and held-out requests.
        max_updates: Of the weights.

    Returns:
        Weights as ``policies.learned_filter.load_filter`` has them, and of the held-out requests: ``updates`` and
        ``loss`` of these weights, and the shares ``final`` of the known proposals, ``passing`` of them, and ``wrong``
        of the passing ones.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(int(samples.request.max()) + 1, generator=generator).numpy()
    is_held_out = np.isin(samples.request, order[: max(1, round(HELD_OUT * order.size))])
    columns, held_out = (
        [torch.from_numpy(one) for one in samples.of(chosen)[:3]] for chosen in (~is_held_out, is_held_out)
    )
    length = samples.confidence.shape[1]
    shapes = dict(zip(NAMES, ((length, length), (length,), (length, length), (length,)), strict=True))
    weights = {
        name: ((2 * torch.rand(shape, generator=generator) - 1) / length**0.5).requires_grad_()
        for name, shape in shapes.items()
    }
    optimizer = torch.optim.AdamW(weights.values(), lr=RATE)
    best, outcome = {}, {"updates": 0, "loss": float("inf")}
    for update in range(max_updates + 1):
        if update % LOOKS_EVERY == 0:
            found = _look(weights, held_out, threshold)
            if found["loss"] < outcome["loss"]:
                best = {name: one.detach().clone() for name, one in weights.items()}
                outcome = {"updates": update, **found}
        chosen = torch.randint(columns[0].shape[0], (BATCH,), generator=generator)
        optimizer.zero_grad()
        _loss(weights, *(one[chosen] for one in columns)).backward()
        optimizer.step()
    return best, outcome


def _logits(weights: "Mapping[str, torch.Tensor]", confidence: "torch.Tensor") -> "torch.Tensor":
    """As ``policies.learned_filter.apply_filter``, by matrix products."""
    from torch.nn.functional import linear

    hidden_weight, hidden_bias, out_weight, out_bias = (weights[name] for name in NAMES)
    return linear(linear(confidence, hidden_weight, hidden_bias).relu(), out_weight, out_bias)


def _loss(
    weights: "Mapping[str, torch.Tensor]",
    confidence: "torch.Tensor",
    is_final: "torch.Tensor",
    is_known: "torch.Tensor",
) -> "torch.Tensor":
    """Mean binary cross-entropy of the known proposals."""
    from torch.nn.functional import binary_cross_entropy_with_logits

    logits = _logits(weights, confidence)[is_known]
    return binary_cross_entropy_with_logits(logits, is_final[is_known].float())


def _look(weights: "Mapping[str, torch.Tensor]", held_out: "list[torch.Tensor]", threshold: float) -> dict[str, float]:
    """What held-out requests say of weights."""
    import torch

    confidence, is_final, is_known = held_out
    with torch.no_grad():
        loss = _loss(weights, *held_out).item()
        passes = (_logits(weights, confidence).sigmoid() > threshold)[is_known]
    right = is_final[is_known]
    return {
        "loss": loss,
        "final": right.float().mean().item(),
        "passing": passes.float().mean().item(),
        "wrong": (passes & ~right).sum().item() / max(1, int(passes.sum())),
    }
