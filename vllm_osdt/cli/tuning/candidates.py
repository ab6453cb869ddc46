"""Which settings ``vllm-osdt tune`` tries: for each policy a list from cautious to bold, fixed before it decodes."""

from vllm_osdt.calibration.profile import OptionValue
from vllm_osdt.calibration.thresholds import num_requests_needed
from vllm_osdt.options import DEFAULTS, DecodingOptions

Setting = dict[str, OptionValue]

REFERENCE: Setting = {"policy": "static_threshold", "threshold": DEFAULTS["threshold"]}
CANDIDATES: dict[str, tuple[Setting, ...]] = {
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
    "prophet": tuple(
        {"prophet_early": 3 * late, "prophet_middle": 2 * late, "prophet_late": late}
        for late in (5.0, 3.5, 2.5, 1.75, 1.25)
    ),
    "sched": tuple({"sched_high": 3 * low, "sched_low": low} for low in (5.0, 3.5, 2.5, 1.75, 1.25)),
}


def candidates_of(policy: str, num_calibrating: int) -> list[Setting]:
    """The settings of a policy in their order; without those that need more calibrating requests than there are."""
    settings = [{"policy": policy, **setting} for setting in CANDIDATES[policy]]
    return [one for one in settings if not calibrates(one) or num_requests_needed(_risk(one)) <= num_calibrating]


def calibrates(setting: Setting) -> bool:
    """Whether a setting takes thresholds from the task's profile."""
    return DecodingOptions(**setting).calibrates


def _risk(setting: Setting) -> float:
    return float(setting.get("risk", DEFAULTS["risk"]))
