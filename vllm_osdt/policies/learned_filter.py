"""Learn2PD: a small network tells which proposals are final, from the confidences of the block.

Source: Learning to Parallel (arXiv 2509.25188), section 4, and the authors' code (ims-kdks/learning-to-parallel): a
network of two layers with as many hidden units as a block has positions, 2112 weights for 32, maps the confidences of
the block to a logit of each position; masked positions with sigmoid(logit) > ``filter_threshold`` are unmasked, the
most confident one where there are none. 0.96 is the threshold of the authors' evaluation script. Besides, their code
unmasks the most confident position in every step, whether others pass or not: ``filter_best``. (It takes as many as its
schedule has in a step, which is one unless a request asks for fewer steps than tokens.)

Deviations: the authors' network sees the probability of the best token at positions that are decided, too. Here these
have no logits and count as 1, as do all positions without a confidence: those of the prompt, behind the end of the
canvas, and outside the active sub-block. The network is trained on the record of a calibration (``vllm-osdt
train-filter``) instead of decodings that the final tokens steer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csrc_triton.types import Rule
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.declaration import Flag, number, option
from vllm_osdt.errors import InvalidOptionError, OSDTError
from vllm_osdt.geometry import MAX_BLOCK_LENGTH, DecodeShape
from vllm_osdt.policies.base import Policy, Schedule, Step, best, constant

if TYPE_CHECKING:
    import torch

NO_LOGITS = 1.0  # confidence of a position that has none, to the network
NAMES = ("hidden.weight", "hidden.bias", "out.weight", "out.bias")


@dataclass(frozen=True)
class LearnedFilterOptions:
    """How sure the network must be."""

    filter_threshold: float = option(
        0.96,
        number(gt=0, lt=1),
        "Of `learned_filter`: a proposal passes when the operator's `filter_file` gives it a higher probability of "
        "being final.",
    )
    filter_best: bool = option(
        False,
        Flag,
        "Of `learned_filter`: the most confident position passes in every step, as in the authors' code. `false`: "
        "where no other does.",
    )


class LearnedFilter(Policy):
    """What a network trained on the model's own decodings takes for final."""

    name = "learned_filter"
    Options = LearnedFilterOptions
    with_profile = "its threshold is on what its filter makes of confidences, and a calibrated one on confidences"
    adjusts = True

    def check_operator(self, options: Any, operator: Any) -> None:
        """The operator's file must be there and fit the block."""
        if operator.filter_file is None:
            if options.policy == self.name:
                raise InvalidOptionError(
                    "policy is 'learned_filter', but this server has no filter: choose another policy, or have the "
                    "operator train one (vllm-osdt train-filter) and name it as filter_file in --osdt-config.",
                    refusal="no-filter",
                    parameter="policy",
                    value=options.policy,
                )
            return
        length = block_length_of(load_filter(operator.filter_file))
        if length != options.block_length:
            raise InvalidOptionError(
                f"block_length is {options.block_length}, but the filter of {operator.filter_file!r} is for blocks of "
                f"{length}: send that, choose another policy, or train a filter on a profile of this block length.",
                refusal="filter-block-length",
                parameter="block_length",
                value=options.block_length,
            )

    def tensors(self, operator: Any) -> "Mapping[str, torch.Tensor]":
        """The network's weights."""
        return {} if operator.filter_file is None else load_filter(operator.filter_file)

    def schedule(
        self, options: LearnedFilterOptions, shape: DecodeShape, thresholds: Thresholds | None = None
    ) -> Schedule:
        """See the class; ``adjust`` chooses."""
        return constant(shape, Rule.THRESHOLD, 1.0, (options.filter_threshold, float(options.filter_best)))

    def adjust(self, step: Step) -> None:
        """Choose what the network takes for final."""
        width, length = step.score.shape[1], block_length_of(step.tensors)
        confidence = step.confidence.masked_fill(~step.is_open, NO_LOGITS)[:, :length]
        if width < length:
            padding = confidence.new_full((confidence.shape[0], length - width), NO_LOGITS)
            confidence = _joined(confidence, padding)
        is_final = apply_filter(step.tensors, confidence).sigmoid() > step.constants[:, :1]
        if length < width:
            is_final = _joined(is_final, is_final.new_zeros(is_final.shape[0], width - length))
        step.choose(is_final[:, :width] | best(step.confidence, step.constants[:, 1]))


def _joined(left: "torch.Tensor", right: "torch.Tensor") -> "torch.Tensor":
    """Columns side by side."""
    import torch  # late: options are read without it

    return torch.cat([left, right], dim=1)


def apply_filter(weights: "Mapping[str, torch.Tensor]", confidence: "torch.Tensor") -> "torch.Tensor":
    """The logit of each proposal of being final, float32 ``[R, B]``.

    Sums of products by row in place of a matrix product, whose order of additions depends on the number of rows.

    Args:
        weights: By name, as :func:`load_filter` returns them.
        confidence: float32 ``[R, B]``, 1 where there is none.
    """
    hidden_weight, hidden_bias, out_weight, out_bias = (weights[name] for name in NAMES)
    hidden = ((confidence.unsqueeze(1) * hidden_weight).sum(dim=2) + hidden_bias).relu()
    return (hidden.unsqueeze(1) * out_weight).sum(dim=2) + out_bias


def block_length_of(weights: "Mapping[str, torch.Tensor]") -> int:
    """Positions of the blocks that a network is for."""
    return weights["out.bias"].shape[0]


@lru_cache(maxsize=8)
def load_filter(path: str) -> "Mapping[str, torch.Tensor]":
    """The weights of a filter, float32 by name: ``hidden.weight`` ``[H, B]``, ``out.weight`` ``[B, H]``, biases.

    Args:
        path: A file in the safetensors format, as ``vllm-osdt train-filter`` writes it.

    Raises:
        OSDTError: It cannot be read, or holds something else.
    """
    import torch  # late: options are read without it
    from safetensors import SafetensorError
    from safetensors.torch import load

    remedy = "name a file that `vllm-osdt train-filter` has written"
    try:
        found = load(Path(path).read_bytes())
    except (OSError, SafetensorError) as error:
        raise OSDTError(f"filter_file {path!r} cannot be read: {error}; {remedy}.") from None
    if sorted(found) != sorted(NAMES):
        raise OSDTError(f"filter_file {path!r} holds {sorted(found)}, not {sorted(NAMES)}; {remedy}.")
    weights = {name: found[name].to(torch.float32) for name in NAMES}
    shapes = [tuple(weights[name].shape) for name in NAMES]
    num_hidden, length = shapes[0] if len(shapes[0]) == 2 else (0, 0)
    if shapes != [(num_hidden, length), (num_hidden,), (length, num_hidden), (length,)]:
        raise OSDTError(f"filter_file {path!r} has tensors of shapes {shapes}, which are no two layers; {remedy}.")
    if not 1 <= length <= MAX_BLOCK_LENGTH or not all(one.isfinite().all() for one in weights.values()):
        raise OSDTError(
            f"filter_file {path!r} is for blocks of {length}, or has weights that are no numbers; {remedy}, for blocks "
            f"of at most {MAX_BLOCK_LENGTH}."
        )
    return weights
