"""The one list of decoding policies that a user may ask for."""

from vllm_osdt.policies.base import DecodingPolicy, Rule, Schedule
from vllm_osdt.policies.entropy_bound import entropy_bound
from vllm_osdt.policies.factor import factor
from vllm_osdt.policies.fixed_steps import fixed_steps
from vllm_osdt.policies.joint_bound import joint_bound
from vllm_osdt.policies.osdt import osdt
from vllm_osdt.policies.static_threshold import static_threshold

POLICIES: dict[str, DecodingPolicy] = {
    "osdt": osdt,
    "static_threshold": static_threshold,
    "factor": factor,
    "joint_bound": joint_bound,
    "entropy_bound": entropy_bound,
    "fixed_steps": fixed_steps,
}

__all__ = ["POLICIES", "DecodingPolicy", "Rule", "Schedule"]
