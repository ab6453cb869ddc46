"""S2D2 on plain networks: the whole sequence in every forward, and verifications position by position.

Source: S2D2 (arXiv 2603.25702); the authors' code (phymhan/S2D2) for what a verification sees: behind the finished
blocks, each position the tokens before it, causally, and its own mask where logits are not shifted.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tests.reference.decode import Decoded, best_first


class View(Protocol):
    """What of a network the loop needs."""

    mask_token_id: int

    def block(self, place: int, prompt_length: int) -> tuple[int, int]:
        """Start and end of the block of a position."""

    def first(self, ids: list[int], start: int) -> torch.Tensor | None:
        """Logits of a block's first position by the pass over all before it; None where there is no such pass."""

    def draft(self, canvas: list[int], start: int) -> dict[int, torch.Tensor]:
        """Logits of a denoising step, by position."""

    def next(self, ids: list[int], start: int) -> torch.Tensor:
        """Logits from left to right of the position behind ``ids``, in the block that begins at ``start``."""


class SDARView:
    """Logits are not shifted; blocks lie on a grid."""

    def __init__(self, network: Any, block_length: int) -> None:
        self.network, self.length, self.mask_token_id = network, block_length, network.mask_token_id

    def block(self, place: int, prompt_length: int) -> tuple[int, int]:
        """See :class:`View`."""
        start = place // self.length * self.length
        return start, start + self.length

    def first(self, ids: list[int], start: int) -> torch.Tensor | None:
        """See :class:`View`."""
        return None

    def draft(self, canvas: list[int], start: int) -> dict[int, torch.Tensor]:
        """See :class:`View`."""
        return dict(enumerate(self.network.forward(torch.tensor(canvas), self.length)))

    def next(self, ids: list[int], start: int) -> torch.Tensor:
        """See :class:`View`."""
        return self._causal([*ids, self.mask_token_id], start)

    def _causal(self, ids: list[int], start: int) -> torch.Tensor:
        positions = torch.arange(len(ids))
        end = torch.where(positions < start, (positions // self.length + 1) * self.length, positions + 1)
        return self.network.run(torch.tensor(ids), positions, positions[None, :] < end[:, None])[-1]


class FastDLLMv2View(SDARView):
    """Logits are shifted by one; a finished block gives the next one's first token."""

    def first(self, ids: list[int], start: int) -> torch.Tensor | None:
        """See :class:`View`."""
        if len(ids) != start or not ids:
            return None
        return self.network.forward(torch.tensor(ids), self.length)[-1]

    def draft(self, canvas: list[int], start: int) -> dict[int, torch.Tensor]:
        """See :class:`View`."""
        return dict(enumerate(self.network.forward(torch.tensor(canvas), self.length), start=1))

    def next(self, ids: list[int], start: int) -> torch.Tensor:
        """See :class:`View`."""
        return self._causal(ids, start)


class NemotronView:
    """Blocks begin behind the prompt; causal passes are shifted, and commit."""

    def __init__(self, network: Any, block_length: int) -> None:
        self.network, self.length, self.mask_token_id = network, block_length, network.mask_token_id

    def block(self, place: int, prompt_length: int) -> tuple[int, int]:
        """See :class:`View`."""
        start = prompt_length + (place - prompt_length) // self.length * self.length
        return start, start + self.length

    def first(self, ids: list[int], start: int) -> torch.Tensor | None:
        """See :class:`View`."""
        return self.network.forward(torch.tensor(ids), len(ids))[-1]

    def draft(self, canvas: list[int], start: int) -> dict[int, torch.Tensor]:
        """See :class:`View`."""
        return dict(enumerate(self.network.forward(torch.tensor(canvas), start)))

    def next(self, ids: list[int], start: int) -> torch.Tensor:
        """See :class:`View`."""
        return self.network.forward(torch.tensor(ids), len(ids))[-1]


@dataclass
class Settings:
    """The options of ``s2d2``; ``quota`` is what ``steps`` ask of each step."""

    threshold: float = 0.9
    is_strict: bool = True
    quota: int = 0
    router: str = "score"
    min_span: int = 1
    max_span: int = 128
    estimator: str = "entropy"
    margin: float = 0.05
    cost: float = 1.0
    cost_per: str = "verification"
    score: float = 0.0
    on: float = 1.0
    off: float = -5.0
    exploration: float = 1.0


@dataclass
class Outcome(Decoded):
    """As :class:`Decoded`; ``taken[verification]``: positions that it verified, and proposals that it took."""

    router_margin: float = float("inf")
    taken: list[tuple[int, int]] = field(default_factory=list)

    def note(self, logits: torch.Tensor) -> int:
        """The best token; how near the second one was."""
        top = logits.topk(2)
        self.proposal_margin = min(self.proposal_margin, (top.values[0] - top.values[1]).item())
        return int(top.indices[0])


class Router:
    """Whether a draft is verified."""

    def __init__(self, settings: Settings, outcome: Outcome) -> None:
        self.settings, self.outcome, self.is_on = settings, outcome, False
        self.rewards: dict[tuple[bool, tuple[bool, ...]], list[float]] = {}  # of the bandit, by choice and context
        self.choice: tuple[bool, tuple[bool, ...]] = (False, ())

    def likely(self, logits: torch.Tensor) -> float:
        """How likely a verification is to take a proposal."""
        share = logits.double().softmax(dim=-1)
        if self.settings.estimator == "margin":
            first, second = share.topk(2).values.tolist()
            self.outcome.router_margin = min(self.outcome.router_margin, abs(first - second - self.settings.margin))
            return float(first - second > self.settings.margin)
        entropy = -torch.special.xlogy(share, share).sum().item()
        return math.exp(-entropy / math.log(len(share)))

    def asks(self, span: list[torch.Tensor], num_confident: int, part: int, num_decided: int) -> bool:
        """Of a draft, given the logits of its first run of masked positions; of ``part`` that are drafted together."""
        settings = self.settings
        if settings.router == "span":
            return len(span) >= settings.min_span
        if settings.router == "bandit":
            return self._bandit(span, part, num_decided)
        expected, so_far = 0.0, 1.0
        for logits in span:
            so_far *= self.likely(logits)
            expected += so_far
        score = expected - settings.cost * (num_confident if settings.cost_per == "confident_position" else 1)
        bound = settings.score
        if settings.router == "hysteresis":
            bound = settings.off if self.is_on else settings.on
        self.outcome.router_margin = min(self.outcome.router_margin, abs(score - bound))
        self.is_on = score >= bound
        return self.is_on and len(span) >= settings.min_span

    def _bandit(self, span: list[torch.Tensor], part: int, num_decided: int) -> bool:
        """UCB over the rewards in the draft's context."""
        shares = [logits.double().softmax(dim=-1) for logits in span]
        entropy = sum(-torch.special.xlogy(share, share).sum().item() for share in shares) / math.log(len(span[0]))
        self.outcome.router_margin = min(self.outcome.router_margin, abs(entropy / len(span) - 0.5))
        length = (len(span) - 1) / (part - 1) if part > 1 else 0.0
        context = length >= 0.5, num_decided / part >= 0.5, entropy / len(span) >= 0.5
        now, values = 1 + sum(map(len, self.rewards.values())), []
        for choice in (False, True):
            rewards = self.rewards.get((choice, context), [])
            bonus = self.settings.exploration * math.sqrt(math.log(now) / len(rewards)) if rewards else math.inf
            values.append((sum(rewards) / len(rewards) if rewards else 0.0) + bonus)
        if math.isfinite(values[0]) and math.isfinite(values[1]) and values[0] != values[1]:
            self.outcome.router_margin = min(self.outcome.router_margin, abs(values[0] - values[1]))
        self.choice = (values[1] >= values[0], context)
        return self.choice[0]

    def hears(self, num_decided: int) -> None:
        """What came of the last draft."""
        self.rewards.setdefault(self.choice, []).append(num_decided / (2 if self.choice[0] else 1))


def decode_s2d2(
    view: View,
    prompt: list[int],
    settings: Settings,
    *,
    max_tokens: int,
    end_token_ids: tuple[int, ...] = (),
    sub_block_length: int | None = None,
) -> Outcome:
    """Decode a request at temperature 0.

    Args:
        view: The network.
        prompt: Token ids.
        settings: Options.
        max_tokens: Output tokens wanted.
        end_token_ids: Where output ends.
        sub_block_length: Positions that are drafted together; None for the block.
    """
    ids, result = list(prompt), Outcome()
    router = Router(settings, result)
    while len(ids) < len(prompt) + max_tokens and (len(ids) == len(prompt) or ids[-1] not in end_token_ids):
        begin = len(ids)
        start, end = view.block(begin, len(prompt))
        canvas: list[int | None] = [*ids, *[None] * (end - begin)]
        ready, first = None, 0
        seeded = view.first(ids, start)
        if seeded is not None:
            seeded[view.mask_token_id] = -torch.inf
            canvas[begin] = result.note(seeded)
            result.nfe += 1
            ready = _ready(canvas, begin, min(end, len(prompt) + max_tokens), end_token_ids)
        while ready is None:
            first = first or canvas.index(None)
            counted = first if sub_block_length is None else start
            part = sub_block_length or end - start
            _step(view, canvas, start, begin, part, settings, router, result, counted)
            ready = _ready(canvas, begin, min(end, len(prompt) + max_tokens), end_token_ids)
        ids += ready
    result.tokens = ids[len(prompt) :]
    result.rule_margin = min(result.rule_margin, result.router_margin)
    return result


def _step(
    view: View,
    canvas: list[int | None],
    start: int,
    begin: int,
    part: int,
    settings: Settings,
    router: Router,
    result: Outcome,
    counted: int,
) -> None:
    """One draft, and its verification; the bandit counts what is decided from ``counted`` on."""
    first = canvas.index(None)
    last = start + ((first - start) // part + 1) * part
    logits = view.draft([view.mask_token_id if token is None else token for token in canvas], begin)
    result.nfe += 1
    token, confidence, lines = {}, {}, {}
    for place in range(first, last):
        if canvas[place] is None:
            line = logits[place]
            share = line.double().softmax(dim=-1)
            line[view.mask_token_id] = -torch.inf
            token[place], lines[place] = result.note(line), line
            confidence[place] = share[token[place]].item()
            result.rule_margin = min(result.rule_margin, abs(confidence[place] - settings.threshold))
    span = []
    for place in range(first, last):
        if place not in token:
            break
        span.append(place)
    confident = [
        place
        for place, c in confidence.items()
        if c > settings.threshold or (not settings.is_strict and c == settings.threshold)
    ]
    counts = range(max(counted, last - part), last)
    num_taken, num_before = 0, sum(canvas[place] is not None for place in counts)
    if router.asks([lines[place] for place in span], len(confident), part, num_before):
        result.nfe += 1
        verified = span[: settings.max_span]
        for place in verified:
            line = view.next([one for one in canvas[:place] if one is not None], start)
            line[view.mask_token_id] = -torch.inf
            canvas[place] = result.note(line)
            num_taken += 1
            if canvas[place] != token[place]:
                break
        result.taken.append((len(verified), num_taken))
    if num_taken < max(settings.quota, 1):
        left = {place: c for place, c in confidence.items() if canvas[place] is None}
        missing = min(max(settings.quota, 1) - num_taken, len(left))
        chosen = [place for place in confident if place in left]
        if len(chosen) < missing:
            ranking = best_first(left)
            if missing < len(ranking):
                gap = left[ranking[missing - 1]] - left[ranking[missing]]
                result.rule_margin = min(result.rule_margin, gap)
            chosen = ranking[:missing]
        for place in chosen:
            canvas[place] = token[place]
    router.hears(sum(canvas[place] is not None for place in counts) - num_before)


def _ready(canvas: list[int | None], begin: int, end: int, end_token_ids: tuple[int, ...]) -> list[int] | None:
    """The block's output once nothing before its end is undecided."""
    found: list[int] = []
    for token in canvas[begin:end]:
        if token is None:
            return None
        found.append(token)
        if token in end_token_ids:
            break
    return found
