"""Which settings ``vllm-osdt tune`` tries: for each policy a list from cautious to bold, fixed before it decodes.

A list has the name of its policy, but for ``freedave_osdt``: ``freedave`` over the task's thresholds. It has one of its
own, so that what a static threshold loses says nothing of them.
"""

from vllm_osdt.calibration.profile import OptionValue
from vllm_osdt.calibration.thresholds import num_requests_needed
from vllm_osdt.options import DEFAULTS, DecodingOptions

Setting = dict[str, OptionValue]

REFERENCE: Setting = {"policy": "static_threshold", "threshold": DEFAULTS["threshold"]}
# Those of the policies that are tried unless others are named. More of them make each one's test stricter.
USUAL: dict[str, tuple[Setting, ...]] = {
    "osdt": (
        {"risk": 0.02, "margin": 0.3},
        {"risk": 0.02, "margin": 0.1},
        {"risk": 0.04, "margin": 0.1},
        {"risk": 0.04, "margin": 0.0},
        {"risk": 0.1, "margin": 0.0},
        {"risk": 0.2, "margin": 0.0},
        {"risk": 0.4, "margin": 0.0},
    ),
    "static_threshold": tuple(
        {"threshold": value} for value in (0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)
    ),
    "factor": tuple({"factor": value} for value in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)),
    "joint_bound": tuple({"delta": value} for value in (0.75, 0.5, 0.25, 0.1, 0.0)),
    "entropy_bound": tuple({"entropy": value} for value in (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4)),
    "local_leap": tuple({"relaxed_threshold": value} for value in (0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4)),
    "bacd": tuple(
        {"max_threshold": high, "min_threshold": low}
        for high, low in ((0.85, 0.6), (0.8, 0.6), (0.75, 0.6), (0.7, 0.6), (0.6, 0.5), (0.5, 0.4), (0.4, 0.3))
    ),
}
# Those that are tried when they are named.
FURTHER: dict[str, tuple[Setting, ...]] = {
    "entropy_threshold": tuple({"max_entropy": value} for value in (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4)),
    "cad_llm": tuple(
        {"cad_threshold": high, "cad_min_threshold": low}
        for high, low in ((0.95, 0.8), (0.9, 0.7), (0.85, 0.6), (0.85, 0.4), (0.7, 0.4), (0.5, 0.3))
    ),
    "ete": tuple({"explore_below": number} for number in (1, 2, 3, 4, 6, 8)),
    "multi_block": tuple({"part_length": 4, "max_entropy": value} for value in (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4)),
    "confidence_adaptive": tuple(
        {"threshold": value, "max_unmask": number}
        for value, number in ((0.95, 4), (0.9, 4), (0.8, 4), (0.8, 8), (0.7, 8), (0.6, 16), (0.5, 32))
    ),
    "dimple": tuple({"threshold": value} for value in (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)),
    "hierarchical": tuple({"run_threshold": value} for value in (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)),
    "nemotron_bound": tuple(
        {"bound_min": least, "bound_factor": value}
        for least, value in ((0.7, 0.5), (0.6, 1.0), (0.5, 1.5), (0.45, 2.0), (0.4, 3.0), (0.3, 4.0))
    ),
    "streaming": tuple({"relaxation": value} for value in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)),
    "wedlm": tuple({"adjusted_entropy": value} for value in (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2)),
    "prophet": tuple(
        {"prophet_early": one, "prophet_middle": two, "prophet_late": three, "commit_threshold": 0.9}
        for one, two, three in ((12.0, 9.0, 6.0), (10.0, 7.0, 4.0), (7.5, 5.0, 2.5), (6.0, 4.0, 2.0), (4.0, 3.0, 1.5))
    ),
    "sched": tuple(
        {"sched_high": high, "sched_low": low, "commit_threshold": 0.9}
        for high, low in ((12.0, 6.0), (10.0, 4.0), (7.5, 2.5), (6.0, 2.0), (4.0, 1.0), (3.0, 0.0))
    ),
    "klass": tuple(
        {"kl_confidence": value, "kl_threshold": kl}
        for value, kl in ((0.95, 0.005), (0.9, 0.01), (0.8, 0.01), (0.7, 0.01), (0.6, 0.015), (0.5, 0.03))
    ),
    "less": tuple(
        {"less_confidence": value, "js_threshold": js}
        for value, js in ((0.9, 0.02), (0.8, 0.03), (0.75, 0.04), (0.6, 0.05), (0.5, 0.07), (0.4, 0.1))
    ),
    "ccd": tuple({"ccd_positions": value} for value in (2, 4, 8, 16)),
    "stable": tuple(
        {"stable_confidence": value, "stable_steps": number}
        for value, number in ((0.8, 2), (0.7, 2), (0.6, 2), (0.5, 2), (0.5, 1), (0.3, 1))
    ),
    "freedave": tuple(
        {"freedave_base": "threshold", "threshold": value} for value in (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
    ),
    "freedave_osdt": tuple(
        {"policy": "freedave", "freedave_base": "threshold", "calibrated": True, **setting} for setting in USUAL["osdt"]
    ),
    "s2d2": tuple(
        {"verify_cost_per": "confident_position", "threshold": value} for value in (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
    ),
    "learned_filter": tuple({"filter_threshold": value} for value in (0.995, 0.99, 0.98, 0.96, 0.9, 0.8, 0.6)),
}
CANDIDATES = USUAL | FURTHER


def candidates_of(name: str, num_calibrating: int) -> list[Setting]:
    """The settings of a list in their order; without those that need more calibrating requests than there are."""
    settings = [{"policy": name, **setting} for setting in CANDIDATES[name]]
    return [one for one in settings if not calibrates(one) or num_requests_needed(_risk(one)) <= num_calibrating]


def calibrates(setting: Setting) -> bool:
    """Whether a setting takes thresholds from the task's profile."""
    return DecodingOptions(**setting).calibrates


def _risk(setting: Setting) -> float:
    return float(setting.get("risk", DEFAULTS["risk"]))
