"""Random options of every policy, and what a plain loop makes of them.

Each policy has a function here that draws its options and makes the plain rule of them, that of the policy's own test
module. A rule knows nothing of a family: it gets positions of a block, counted from the first undecided one.
"""

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from tests.policies.test_bacd import PlainBACD
from tests.policies.test_block_cuts import PlainAdaBlock, PlainCadLLM
from tests.policies.test_early_exit import PlainExit, prophet_tau, sched_tau
from tests.policies.test_learned_filter import PlainFilter
from tests.policies.test_local_leap import passing
from tests.policies.test_selection import (
    Adaptive,
    Dimple,
    EntropyThreshold,
    Hierarchical,
    Nemotron,
    Product,
    Streaming,
    WeDLM,
)
from tests.policies.test_several_at_once import PlainETE, PlainMultiBlock
from tests.policies.test_stability import PlainCCD, PlainKLASS, PlainLESS, PlainRelease, PlainStable
from tests.reference.decode import (
    EntropyBound,
    ThresholdRule,
    best_first,
    enter,
    factor,
    joint_bound,
    look,
    sureness,
)
from tests.reference.self_speculation import Settings
from vllm_osdt.options import DECLARED

LOGIT_NOISE, ENTROPY_NOISE = 3e-5, 1e-4  # more than an engine's rounding changes
RULE_MARGIN = 1e-6  # of what rules compare: differences of confidences and of entropies in parts
EDGES = 0.1  # of the draws are an end of what is declared


class Place(NamedTuple):
    """Where a request is decoded.

    Attributes:
        length: Of a block.
        sub_length: Of what is denoised together; ``length`` for all of a block.
        is_shifted: Whether a block's first step may decide its first position alone.
        is_strict: Whether equality does not pass a static threshold.
        is_block_causal: Whether no block sees a later one.
        has_parts: Whether blocks have sub-blocks.
        num_positions, num_blocks: Of the canvas, without the prompt.
        num_asked: Blocks that hold the output, counted from its start.
        ends: Tokens that end the output.
        weights: Of the engine's filter.
    """

    length: int
    sub_length: int
    is_shifted: bool
    is_strict: bool
    is_block_causal: bool
    has_parts: bool
    num_positions: int
    num_blocks: int
    num_asked: int
    ends: tuple[int, ...]
    weights: dict[str, torch.Tensor]

    def shares(self, steps: int) -> list[int]:
        """Positions that each of a block's steps takes, where they are equal parts of it."""
        row, num_parts = [], self.length // self.sub_length
        for part in range(num_parts):
            num_alone = int(self.is_shifted and part == 0)
            number = self.sub_length - num_alone
            num_steps = max(steps // num_parts - num_alone, int(number > 0))
            row += [1] * num_alone + [number // num_steps + (k < number % num_steps) for k in range(num_steps)]
        return row


Options = dict[str, Any]
Drawn = tuple[Options, Any]  # and the rule, or the settings of verifications


class Draw:
    """Draws values of declared options.

    Args:
        seed: Of all of them.
    """

    def __init__(self, seed: Any) -> None:
        self.random = random.Random(seed)

    def real(self, name: str, low: float, high: float) -> float:
        """A number, mostly between two that tell; sometimes an end of the declared range."""
        schema, value = DECLARED[name].schema, round(self.random.uniform(low, high), 3)
        ends = [schema[end] for end in ("minimum", "maximum") if end in schema]
        if ends and self.random.random() < EDGES:
            value = self.random.choice(ends)
        return float(DECLARED[name].check(name, float(value)))

    def whole(self, name: str, low: int, high: int) -> int:
        """As :meth:`real`, an integer."""
        schema, value = DECLARED[name].schema, self.random.randint(low, high)
        ends = [schema[end] for end in ("minimum", "maximum") if schema.get(end) is not None]
        if self.random.random() < EDGES:
            value = self.random.choice(ends)
        return int(DECLARED[name].check(name, value))

    def word(self, name: str) -> str:
        """One of the declared words."""
        return str(self.random.choice(DECLARED[name].schema["enum"]))

    def flag(self, share: float = 0.5) -> bool:
        """Whether something is so."""
        return self.random.random() < share

    def steps(self, place: Place) -> tuple[Options, list[int]]:
        """Denoising steps of a block, or of the canvas where that is whole blocks, and what each of them takes."""
        num_parts = place.length // place.sub_length
        steps = self.random.randint(1, place.sub_length) * num_parts
        options = {"steps_per_block": steps}
        if self.flag(0.3):
            options = {"steps": steps * place.num_asked}
        return options, place.shares(steps)

    def quota(self, place: Place) -> tuple[Options, list[int] | None]:
        """The same of a policy that has it beside another rule; not asked for where blocks have parts."""
        if place.has_parts or self.flag():
            return {}, None
        return self.steps(place)


class Shares:
    """As many of the most confident positions as the step's share."""

    def __init__(self, row: list[int]) -> None:
        self.row = row

    def __call__(self, block: int, step: int, masked: dict[int, float]) -> list[int]:
        return best_first(masked)[: max([1, *self.row[step : step + 1]])]


class AtLeast:
    """What another rule says, or the step's share, whichever is more."""

    margin = math.inf

    def __init__(self, rule: Any, row: list[int] | None) -> None:
        self.rule, self.row = rule, row

    def __call__(self, block: int, step: int, masked: dict[int, float]) -> list[int]:
        chosen = self.rule(block, step, masked)
        return chosen if self.row is None else max(chosen, Shares(self.row)(block, step, masked), key=len)


class WithQuota:
    """A rule that takes the step's share where it finds nothing better."""

    def __init__(self, rule: Any, row: list[int] | None) -> None:
        self.rule, self.row = rule, row or []

    def begin_block(self, first: int = 0) -> None:
        self.rule.begin_block()

    def see(self, *seen: Any) -> Any:
        return self.rule.see(*seen)

    def __call__(self, block: int, step: int, masked: dict[int, float]) -> list[int]:
        self.rule.quota = max([1, *self.row[step : step + 1]])
        return self.rule(block, step, masked)


def above(tau: float, place: Place) -> ThresholdRule:
    """The static threshold."""
    return ThresholdRule(lambda block, step: tau, strict=place.is_strict)


def static_threshold(draw: Draw, place: Place) -> Drawn:
    tau = draw.real("threshold", 0.1, 0.6)
    steps, row = draw.quota(place)
    return {"threshold": tau, **steps}, AtLeast(above(tau, place), row)


def factor_rule(draw: Draw, place: Place) -> Drawn:
    f = draw.real("factor", 0.5, 5.0)
    return {"factor": f}, factor(f)


def joint(draw: Draw, place: Place) -> Drawn:
    delta = draw.real("delta", 0.0, 0.3)
    return {"delta": delta}, joint_bound(delta)


def entropy_bound(draw: Draw, place: Place) -> Drawn:
    bound = draw.real("entropy", 1.0, 12.0)
    return {"entropy": bound}, EntropyBound(bound)


def entropy_threshold(draw: Draw, place: Place) -> Drawn:
    bound = draw.real("max_entropy", 0.5, 3.5)
    return {"max_entropy": bound}, EntropyThreshold(bound)


def fixed_steps(draw: Draw, place: Place) -> Drawn:
    steps, row = draw.steps(place)
    return steps, Shares(row)


def freedave(draw: Draw, place: Place) -> Drawn:
    drafts = draw.whole("freedave_drafts", 1, 8)
    if draw.flag(0.7):
        steps, row = draw.steps(place)
        return {"freedave_drafts": drafts, "freedave_base": "steps", **steps}, Shares(row)
    tau = draw.real("threshold", 0.1, 0.6)  # the base decoder's own tokens, if nothing but the block is drafted
    own: Options = {"freedave_base": "threshold", "threshold": tau, "freedave_accept": draw.word("freedave_accept")}
    if own["freedave_accept"] == "subset":
        drafts = 1
    return {**own, "freedave_drafts": drafts}, above(tau, place)


def local_leap(draw: Draw, place: Place) -> Drawn:
    anchor, relaxed = draw.real("anchor_threshold", 0.15, 0.6), draw.real("relaxed_threshold", 0.05, 0.4)
    radius = draw.whole("leap_radius", 0, 4)

    def rule(block: int, step: int, masked: dict[int, float]) -> list[int]:
        return sorted(passing(masked, radius, anchor, relaxed))

    return {"anchor_threshold": anchor, "relaxed_threshold": relaxed, "leap_radius": radius}, rule


def bacd(draw: Draw, place: Place) -> Drawn:
    low, high = sorted([draw.real("min_threshold", 0.05, 0.3), draw.real("max_threshold", 0.2, 0.7)])
    return {"min_threshold": low, "max_threshold": high}, PlainBACD(low, high)


def cad_llm(draw: Draw, place: Place) -> Drawn:
    low, high = sorted([draw.real("cad_min_threshold", 0.05, 0.3), draw.real("cad_threshold", 0.2, 0.7)])
    ramp, has_vocabulary = draw.word("cad_ramp"), draw.flag()
    first = draw.random.randint(1, place.length)
    shortest = draw.random.randint(1, first)
    options = {
        "cad_threshold": high,
        "cad_min_threshold": low,
        "cad_ramp": ramp,
        "cad_first_block": first,
        "cad_min_block": shortest,
        "cad_vocabulary": has_vocabulary,
    }
    steps, most = sorted([draw.whole("cad_steps", 1, 12), draw.whole("cad_max_steps", 6, 40)])
    if ramp == "block":
        options |= {"cad_steps": steps, "cad_max_steps": most}
    rule = PlainCadLLM(place.length, ramp, high, low, shortest, first, steps, most, has_vocabulary)
    rule.length = place.num_positions
    return options, rule


def ete(draw: Draw, place: Place) -> Drawn:
    tau, below = draw.real("threshold", 0.1, 0.6), draw.whole("explore_below", 1, 4)
    rank = draw.real("explore_rank", 0.0, 1.0)
    return {"threshold": tau, "explore_below": below, "explore_rank": rank}, PlainETE(tau, below, rank)


def multi_block(draw: Draw, place: Place) -> Drawn:
    tau, part = draw.real("max_entropy", 0.5, 3.5), draw.random.randint(1, place.length)
    # Halves and quarters: which share is enough does not hang on rounding.
    shares = sorted(draw.random.choice([0.0, 0.25, 0.5, 0.75, 1.0, draw.real("enter_share", 0, 1)]) for _ in "ab")
    rule = draw.word("multi_block_rule")
    options = {"max_entropy": tau, "part_length": part, "enter_share": shares[0], "full_share": shares[1]}
    return {**options, "multi_block_rule": rule}, PlainMultiBlock(place.length, part, tau, *shares, rule)


def confidence_adaptive(draw: Draw, place: Place) -> Drawn:
    most, cap = draw.whole("max_unmask", 1, 4), draw.whole("max_block_steps", 1, 8) if draw.flag(0.3) else None
    after = draw.random.choice([0.0, 0.25, 0.5, 0.75, 1.0])
    options: Options = {"max_unmask": most, "max_block_steps": cap, "end_after": after}
    about = {"cap": cap, "end_after": after, "ends": place.ends, "total": place.num_positions}
    if draw.flag():
        bound = draw.real("adaptive_entropy", 0.5, 3.5)
        return {**options, "adaptive_entropy": bound}, Adaptive(-bound, most, by_entropy=True, **about)
    tau = draw.real("threshold", 0.1, 0.6)
    return {**options, "threshold": tau}, Adaptive(tau, most, **about)


def dimple(draw: Draw, place: Place) -> Drawn:
    tau, rank = draw.real("threshold", 0.2, 0.8), draw.word("fallback_rank")
    steps, _ = draw.steps(place)
    number = steps.get("steps_per_block", steps.get("steps", 0) // place.num_asked)
    own: Options = {"threshold": tau, "fallback_rank": rank, **steps}
    on_rank = rank != "probability" and draw.flag()
    if on_rank:
        own["threshold_on_rank"] = True
    return own, Dimple(tau, number, rank, on_rank)


def hierarchical(draw: Draw, place: Place) -> Drawn:
    tau, low = draw.real("threshold", 0.2, 0.8), draw.real("run_threshold", 0.05, 0.4)
    return {"threshold": tau, "run_threshold": low}, Hierarchical(tau, low)


def streaming(draw: Draw, place: Place) -> Drawn:
    tau, relaxation = draw.real("threshold", 0.2, 0.9), draw.real("relaxation", 0.0, 1.0)
    own: Options = {"threshold": tau, "relaxation": relaxation}
    window = None
    if not place.is_block_causal and draw.flag():
        own["ratio_window"] = window = draw.whole("ratio_window", 0, 8)
    return own, Streaming(tau, relaxation, window)


def nemotron_bound(draw: Draw, place: Place) -> Drawn:
    form, tau = draw.word("bound_form"), draw.real("threshold", 0.05, 0.6)
    if form == "product":
        return {"bound_form": form, "threshold": tau}, Product(tau)
    low, f = draw.real("bound_min", 0.0, 0.4), draw.real("bound_factor", 0.5, 4.0)
    return {"bound_form": form, "threshold": tau, "bound_min": low, "bound_factor": f}, Nemotron(tau, low, f)


def wedlm(draw: Draw, place: Place) -> Drawn:
    bound, penalty = draw.real("adjusted_entropy", 0.5, 3.5), draw.real("distance_penalty", 0.0, 0.3)
    return {"adjusted_entropy": bound, "distance_penalty": penalty}, WeDLM(bound, penalty)


def early_exit(
    draw: Draw, place: Place, tau: Any, *, is_last_one: bool, has_progress: bool = False, **gates: Any
) -> Drawn:
    """What ``prophet`` and ``sched`` share."""
    scope = draw.word("exit_scope")
    about = {"is_last_one": is_last_one, "num_positions": place.num_positions, **gates}
    if scope == "answer":
        about["num_blocks"] = place.num_blocks
    if draw.flag():
        cutoff = draw.real("commit_threshold", 0.2, 0.9)
        options, row = draw.quota(place)
        own = {"exit_scope": scope, "commit_threshold": cutoff, **options}
        passes = ThresholdRule(lambda block, step: cutoff, strict=False)
        return own, PlainExit(tau, passes=AtLeast(passes, row), **about)
    options, row = draw.steps(place)
    number = options.get("steps_per_block", options.get("steps", 0) // place.num_asked)
    own = {"exit_scope": scope, **options}
    if has_progress and draw.flag():
        own["prophet_progress"], about["counts_itself"] = "release", True
    return own, PlainExit(tau, number, shares=row, **about)


def prophet(draw: Draw, place: Place) -> Drawn:
    names = ("prophet_early", "prophet_middle", "prophet_late")
    gaps = [draw.real(name, 0.3, 3.0) for name in names]
    options, rule = early_exit(draw, place, prophet_tau(*gaps), is_last_one=False, has_progress=True)
    return {**options, **dict(zip(names, gaps, strict=True))}, rule


def sched(draw: Draw, place: Place) -> Drawn:
    low, high = sorted([draw.real("sched_low", 0.2, 2.0), draw.real("sched_high", 0.5, 4.0)])
    form, rate = draw.word("sched_form"), draw.real("sched_rate", 0.5, 6.0)
    gates = {
        "patience": draw.whole("sched_patience", 0, 2),
        "min_progress": draw.real("sched_min_progress", 0.0, 0.6),
        "max_change": draw.real("sched_max_change", 0.2, 1.0),
    }
    own = {f"sched_{name}": value for name, value in gates.items()}
    own |= {"sched_low": low, "sched_high": high, "sched_form": form}
    own |= {"sched_rate": rate} if form == "exponential" else {}
    options, rule = early_exit(draw, place, sched_tau(form, high, low, rate), is_last_one=True, **gates)
    return {**options, **own}, rule


def klass(draw: Draw, place: Place) -> Drawn:
    confidence, bound = draw.real("kl_confidence", 0.05, 0.4), draw.real("kl_threshold", 0.01, 0.6)
    number = draw.whole("kl_steps", 1, 2)
    steps, row = draw.quota(place)
    options = {"kl_confidence": confidence, "kl_threshold": bound, "kl_steps": number, **steps}
    return options, WithQuota(PlainKLASS(confidence, bound, number), row)


def less(draw: Draw, place: Place) -> Drawn:
    confidence, bound = draw.real("less_confidence", 0.05, 0.4), draw.real("js_threshold", 0.01, 0.3)
    number = draw.whole("persistence", 1, 2)
    steps, row = draw.quota(place)
    options = {"less_confidence": confidence, "js_threshold": bound, "persistence": number, **steps}
    return options, WithQuota(PlainLESS(confidence, bound, number), row)


def ccd(draw: Draw, place: Place) -> Drawn:
    dynamic = draw.flag(0.7)
    steps, row = draw.quota(place)
    options = {"ccd_dynamic": dynamic, "ccd_rule": draw.word("ccd_rule"), **steps}
    if options["ccd_rule"] == "release":
        return options, WithQuota(PlainRelease(dynamic), row)
    window, number = draw.whole("ccd_window", 2, 3), draw.whole("ccd_positions", 1, 6)
    options |= {"ccd_window": window, "ccd_positions": number}
    return options, WithQuota(PlainCCD(window, number, dynamic), row)


def stable(draw: Draw, place: Place) -> Drawn:
    number, confidence = draw.whole("stable_steps", 1, 2), draw.real("stable_confidence", 0.05, 0.4)
    return {"stable_steps": number, "stable_confidence": confidence}, PlainStable(number, confidence)


def learned_filter(draw: Draw, place: Place) -> Drawn:
    threshold = draw.real("filter_threshold", 0.2, 0.8)
    with_best = draw.flag()
    own: Options = {"filter_threshold": threshold, "filter_best": with_best}
    return own, PlainFilter(place.weights, threshold, with_best)


def s2d2(draw: Draw, place: Place) -> Drawn:
    own: Options = {"router": draw.word("verify_router"), "estimator": draw.word("verify_estimator")}
    spans = sorted([draw.whole("verify_min_span", 1, 3), draw.whole("verify_max_span", 2, 8)])
    own |= {"min_span": spans[0], "max_span": spans[1]}
    if own["router"] == "bandit":
        own = {"router": "bandit", "max_span": spans[1], "exploration": draw.real("verify_exploration", 0.0, 2.0)}
    elif own["router"] == "span":
        del own["estimator"]
    else:
        own |= {"cost": draw.real("verify_cost", 0.3, 1.5), "cost_per": draw.word("verify_cost_per")}
    if own["router"] == "score":
        own["score"] = draw.real("verify_score", -0.5, 0.5)
    if own["router"] == "hysteresis":
        own |= {"on": draw.real("verify_on", 0.5, 1.5), "off": draw.real("verify_off", -1.0, 0.4)}
    if own.get("estimator") == "margin":
        own["margin"] = draw.real("verify_margin", 0.02, 0.2)
    tau = draw.real("threshold", 0.1, 0.6)
    options: Options = {f"verify_{name}": value for name, value in own.items()}
    settings = Settings(tau, place.is_strict, **own)
    if not place.has_parts and place.length % 2 == 0 and draw.flag(0.3):
        number, settings.quota = place.length // 2, 2
        options |= {"steps": number * place.num_asked} if draw.flag() else {"steps_per_block": number}
    return {**options, "threshold": tau}, settings


# All but `osdt`, whose thresholds are a profile's (test_osdt.py).
DRAWS: dict[str, Callable[[Draw, Place], Drawn]] = {
    "static_threshold": static_threshold,
    "factor": factor_rule,
    "joint_bound": joint,
    "entropy_bound": entropy_bound,
    "entropy_threshold": entropy_threshold,
    "local_leap": local_leap,
    "bacd": bacd,
    "cad_llm": cad_llm,
    "ete": ete,
    "multi_block": multi_block,
    "confidence_adaptive": confidence_adaptive,
    "dimple": dimple,
    "hierarchical": hierarchical,
    "nemotron_bound": nemotron_bound,
    "streaming": streaming,
    "wedlm": wedlm,
    "prophet": prophet,
    "sched": sched,
    "klass": klass,
    "less": less,
    "ccd": ccd,
    "stable": stable,
    "learned_filter": learned_filter,
    "s2d2": s2d2,
    "fixed_steps": fixed_steps,
    "freedave": freedave,
}


class Credited:
    """CreditDecoding beside a rule: one number for each position and token."""

    def __init__(self, rule: Any, alpha: float, gamma: float, beta: float) -> None:
        self.rule, self.alpha, self.gamma, self.beta = rule, alpha, gamma, beta
        self.by_entropy = getattr(rule, "by_entropy", False)
        if hasattr(rule, "cut"):
            self.cut = rule.cut
        self.credit: dict[int, torch.Tensor] = {}
        self.written: dict[int, torch.Tensor] = {}

    def begin_block(self, first: int = 0) -> None:
        self.credit = {}
        enter(self.rule)

    def see(self, step: int, rows: Any, proposals: Any, masked: Any, left: int) -> dict[int, tuple[int, float]]:
        changed, written, tokens, confidences = {}, {}, {}, {}
        for place, row in rows.items():
            credit = self.credit.setdefault(place, torch.zeros(row.shape[0], dtype=torch.float64))
            share = self.written[place].double().softmax(dim=-1)
            credit *= self.beta
            credit[proposals[place]] += share[proposals[place]] ** self.gamma
            changed[place] = row.double() + self.alpha * credit.log1p()
            written[place] = self.written[place].double() + self.alpha * credit.log1p()
            tokens[place] = int(changed[place].argmax())
            confidences[place] = sureness(self.rule, written[place].softmax(dim=-1), tokens[place])
        look(self.rule, step, changed, written, tokens, confidences, left)
        return {place: (tokens[place], confidences[place]) for place in rows}

    def __call__(self, block: int, step: int, masked: dict[int, float]) -> list[int]:
        return self.rule(block, step, masked)


class Cut(PlainAdaBlock):
    """AdaBlock beside a rule."""

    def __init__(self, rule: Any, threshold: float, usual: int, delimiters: Sequence[int]) -> None:
        super().__init__(0.5, threshold, usual, delimiters)
        self.rule, self.by_entropy, self.written = rule, getattr(rule, "by_entropy", False), {}

    margin = math.inf

    def begin_block(self, first: int = 0) -> None:
        enter(self.rule)

    def see(self, step: int, rows: Any, proposals: Any, masked: Any, left: int) -> dict[int, tuple[int, float]]:
        look(self.rule, step, rows, self.written, proposals, masked, left)
        return {place: (proposals[place], masked[place]) for place in rows}

    def cut(self, proposals: dict[int, int], masked: dict[int, float]) -> int:
        if self.by_entropy:
            masked = {place: math.exp(confidence) for place, confidence in masked.items()}
        return int(super().cut(proposals, masked))


class Watched:
    """A rule, and whether rounding could have made it choose otherwise; ``margin`` is then 0.

    Every step is decided anew by copies of the rule, with logits and confidences that are a little different, one way
    and the other.

    Args:
        rule: Of a request.
        seed: Of the differences.
        num_pairs: Of copies.
    """

    def __init__(self, rule: Any, seed: int = 0, num_pairs: int = 1) -> None:
        self.rule, self.by_entropy = rule, getattr(rule, "by_entropy", False)
        self.is_clear, self.first, self.written = True, 0, {}
        self.random, self.num_pairs = torch.Generator().manual_seed(seed), num_pairs
        self.others: list[tuple[Any, dict[int, float]]] = []
        if hasattr(rule, "cut"):
            self.cut = self._cut

    @property
    def margin(self) -> float:
        """0 where it could; few differences of what a rule compares are smaller than this at random."""
        rule, margins = self.rule, [math.inf]
        while rule is not None:
            margins.append(getattr(rule, "margin", math.inf))
            rule = getattr(rule, "rule", None)
        return math.inf if self.is_clear and min(margins) > RULE_MARGIN else 0.0

    def begin_block(self, first: int = 0) -> None:
        self.first = first
        enter(self.rule)

    def see(self, step: int, rows: Any, proposals: Any, masked: Any, left: int) -> dict[int, tuple[int, float]]:
        rows, written, proposals, masked = (
            {place - self.first: one for place, one in of.items()} for of in (rows, self.written, proposals, masked)
        )
        self.others = [(copy.deepcopy(self.rule), {}) for _ in range(2 * self.num_pairs)]
        found, own = dict(proposals), dict(masked)
        look(self.rule, step, rows, written, found, own, left)
        for (other, moved), noise in zip(self.others, self._noise(list(rows), len(rows[min(rows)])), strict=True):
            tokens = dict(proposals)
            moved |= {place: self._moved(c, noise[place][0].item()) for place, c in masked.items()}
            others = [{place: row + LOGIT_NOISE * noise[place] for place, row in of.items()} for of in (rows, written)]
            look(other, step, *others, tokens, moved, left)
            for place in moved:  # a rule may have made them anew; this is how they are held
                moved[place] += noise[place][0].item() * (4e-6 if self.by_entropy else 1e-7)
            if tokens != found:
                self.is_clear = False
        return {place + self.first: (found[place], own[place]) for place in rows}

    def __call__(self, block: int, step: int, masked: dict[int, float]) -> list[int]:
        masked = {place - self.first: confidence for place, confidence in masked.items()}
        chosen = self.rule(block, step, masked)
        for other, moved in self.others:
            if set(other(block, step, {place: moved[place] for place in masked})) != set(chosen):
                self.is_clear = False
        return [place + self.first for place in chosen]

    def _cut(self, proposals: dict[int, int], masked: dict[int, float]) -> int:
        length = self.rule.cut(proposals, masked)
        if any(other.cut(proposals, moved) != length for other, moved in self.others):
            self.is_clear = False
        return int(length)

    def _noise(self, places: list[int], vocabulary: int) -> Iterator[dict[int, torch.Tensor]]:
        """For each copy numbers between -1 and 1, away from 0; those of two copies are opposite ones."""
        for _ in range(self.num_pairs):
            noise = torch.rand(len(places), vocabulary, generator=self.random) - 0.5
            noise += 0.5 * noise.sign()
            yield dict(zip(places, noise, strict=True))
            yield dict(zip(places, -noise, strict=True))

    def _moved(self, confidence: float, by: float) -> float:
        if self.by_entropy:
            return confidence + ENTROPY_NOISE * by
        return confidence + by * (LOGIT_NOISE * confidence * (1 - confidence) + 1e-7)


def modified(draw: Draw, place: Place, policy: Any, drawn: Drawn) -> Drawn:
    """The same with modifiers, where they go with it."""
    options, rule = drawn
    if not (policy.has_branches or policy.verifies or policy.reads_step_before) and draw.flag(0.3):
        numbers = {
            "alpha": draw.real("credit_alpha", 0.2, 2.0),
            "gamma": draw.real("credit_gamma", 0.1, 1.0),
            "beta": draw.real("credit_beta", 0.3, 1.0),
        }
        options = {**options, "credit": True} | {f"credit_{name}": value for name, value in numbers.items()}
        rule = Credited(rule, **numbers)
    if place.is_block_causal or policy.cuts_blocks or policy.needs_whole_blocks:
        return options, rule
    if draw.flag(0.3):
        number = draw.random.randint(1, 5)
        delimiters = draw.random.sample(range(3, 99), number)
        threshold, usual = draw.real("adablock_threshold", 0.02, 0.3), draw.whole("adablock_length", 2, place.length)
        rule = Cut(rule, threshold, min(usual, place.length), delimiters)
        options = {**options, "adablock": True, "adablock_threshold": threshold, "adablock_length": usual}
        options["adablock_delimiters"] = delimiters
    return options, rule
