"""The one list of decoding policies that a user may ask for.

A package registers one of its own through the entry-point group ``vllm_osdt.policies``: the entry's name is the
policy's, its value a subclass of :class:`Policy`.
"""

import logging
from importlib import metadata

from vllm_osdt.declaration import declarations
from vllm_osdt.policies.bacd import BACD
from vllm_osdt.policies.base import Policy, PositionLogits, Schedule, Step
from vllm_osdt.policies.cad_llm import CadLLM
from vllm_osdt.policies.ccd import CCD
from vllm_osdt.policies.confidence_adaptive import ConfidenceAdaptive
from vllm_osdt.policies.credit import Credit
from vllm_osdt.policies.dimple import Dimple
from vllm_osdt.policies.entropy_bound import EntropyBound
from vllm_osdt.policies.entropy_threshold import EntropyThreshold
from vllm_osdt.policies.ete import ETE
from vllm_osdt.policies.factor import Factor
from vllm_osdt.policies.fixed_steps import FixedSteps
from vllm_osdt.policies.freedave import FreeDave
from vllm_osdt.policies.hierarchical import Hierarchical
from vllm_osdt.policies.joint_bound import JointBound
from vllm_osdt.policies.klass import KLASS
from vllm_osdt.policies.learned_filter import LearnedFilter
from vllm_osdt.policies.less import LESS
from vllm_osdt.policies.local_leap import LocalLeap
from vllm_osdt.policies.modifier import Modifier
from vllm_osdt.policies.multi_block import MultiBlock
from vllm_osdt.policies.nemotron_bound import NemotronBound
from vllm_osdt.policies.osdt import OSDT
from vllm_osdt.policies.prophet import Prophet
from vllm_osdt.policies.s2d2 import S2D2
from vllm_osdt.policies.sched import Sched
from vllm_osdt.policies.stable import Stable
from vllm_osdt.policies.static_threshold import StaticThreshold
from vllm_osdt.policies.streaming import Streaming
from vllm_osdt.policies.wedlm import WeDLM

logger = logging.getLogger(f"vllm.{__name__}")

ENTRY_POINT_GROUP = "vllm_osdt.policies"
OWN: tuple[type[Policy], ...] = (
    OSDT,
    StaticThreshold,
    Factor,
    JointBound,
    EntropyBound,
    EntropyThreshold,
    LocalLeap,
    BACD,
    CadLLM,
    ETE,
    MultiBlock,
    ConfidenceAdaptive,
    Dimple,
    Hierarchical,
    NemotronBound,
    Streaming,
    WeDLM,
    Prophet,
    Sched,
    KLASS,
    LESS,
    CCD,
    Stable,
    LearnedFilter,
    S2D2,
    FixedSteps,
    FreeDave,
)


def load_policies() -> dict[str, Policy]:
    """Our policies, and those of installed packages. One that cannot be used is named in the log and left out."""
    policies: dict[str, Policy] = {one.name: one() for one in OWN}
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            found = entry.load()
            _check(entry.name, found, policies)
            policies[entry.name] = found()
        except Exception as error:  # a package of other people's may fail in any way; serving goes on without it
            logger.warning("The decoding policy %r of %s is left out: %s", entry.name, entry.value, error)
    return policies


def _check(name: str, policy: type[Policy], policies: dict[str, Policy]) -> None:
    """Refuse a policy that cannot stand beside the others.

    Raises:
        ValueError: Says why.
    """
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise ValueError(f"it is {policy!r}, no subclass of vllm_osdt.policies.Policy")
    if policy.name != name:
        raise ValueError(f"its class is named {policy.name!r}; name the entry point likewise")
    if name in policies:
        raise ValueError("a policy of that name is there already")
    if not callable(policy.calibrates):
        raise ValueError("its calibrates is no method; it takes the request's options and says whether it does")
    for modifier in MODIFIERS:
        if declarations(policy.Options).keys() & declarations(modifier.Options).keys():
            raise ValueError(f"it has an option of {modifier.name!r}; give it another name")
    for other in policies.values():
        theirs = declarations(other.Options)
        for option, declaration in declarations(policy.Options).items():
            if option in theirs and theirs[option] is not declaration:
                raise ValueError(f"its option {option!r} is one of policy {other.name!r}; give it another name")


MODIFIERS: tuple[Modifier, ...] = (Credit(),)
POLICIES = load_policies()

__all__ = ["MODIFIERS", "POLICIES", "Modifier", "Policy", "PositionLogits", "Schedule", "Step"]
