"""Values that a user wrote, checked and laid over the defaults: the rules that hold for every model."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm_osdt.calibration.profile import Choice
from vllm_osdt.declaration import declarations, meant_or_known
from vllm_osdt.errors import InvalidOptionError, shown
from vllm_osdt.geometry import BLOCK_CACHE, CACHES_OF_FAMILIES, CAUSAL_CACHES
from vllm_osdt.options import (
    DECLARED,
    DEFAULTS,
    FORMER_NAMES,
    OPTION_NAMES,
    PREFIX,
    REQUEST_FIELDS,
    SERVER_DECLARED,
    SERVER_OPTION_NAMES,
    DecodingOptions,
    ServerOptions,
    policies_of,
)
from vllm_osdt.policies import MODIFIERS, POLICIES
from vllm_osdt.policies.adablock import AdaBlockOptions
from vllm_osdt.policies.osdt import OSDTOptions

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own, whose handlers it uses
_warned: set[str] = set()


def parse_options(values: Mapping[str, Any], *, base: DecodingOptions, prefix: str = "") -> DecodingOptions:
    """Lay ``values`` over ``base``.

    Args:
        values: Option names (each starting with ``prefix``) to values.
        base: What holds for names that ``values`` lacks.
        prefix: ``"osdt_"`` for a request, empty for the operator's defaults.

    Raises:
        InvalidOptionError: An unknown name, a wrong type, a value out of range, or options that contradict each other.
    """
    changes = _check_values(values, prefix)
    options = _with_changes(base, changes)
    _check_composed(options, changes, prefix)
    if prefix:
        _check_used(options, changes)
    for policy in POLICIES.values():
        policy.check(options)
    for modifier in MODIFIERS:
        if modifier.is_on(options) and not modifier.goes_with(POLICIES[options.policy]):
            raise InvalidOptionError(
                f"{prefix}{modifier.name} is true, but policy {options.policy!r} compares the model's distributions of "
                f"two steps, which {modifier.name} changes; leave it out or choose another policy.",
                refusal="modifier-policy",
                parameter=f"{prefix}{modifier.name}",
                value=True,
            )
    allowed = next(modes for modes in CACHES_OF_FAMILIES if base.cache_mode in modes)
    if options.cache_mode not in allowed:
        raise InvalidOptionError(
            f"{prefix}cache_mode is {options.cache_mode!r}; this model's attention allows {', '.join(allowed)}: leave "
            "it out.",
            refusal="cache-mode",
            parameter=f"{prefix}cache_mode",
            value=options.cache_mode,
        )
    return options


def with_choice(options: DecodingOptions, choice: Choice) -> DecodingOptions:
    """The options of a request that leaves it to its task's profile how positions are chosen.

    Raises:
        InvalidOptionError: The policy or one of its options is not known here, or they do not go with the request's.
    """
    return parse_options({"policy": choice.policy, **choice.options}, base=options)


def parse_server_options(values: Mapping[str, Any]) -> ServerOptions:
    """Check what the operator alone decides.

    Raises:
        InvalidOptionError: A wrong type or a value out of range.
    """
    return ServerOptions(**{name: SERVER_DECLARED[name].check(name, value) for name, value in values.items()})


def check_operator_values(values: Mapping[str, Any]) -> DecodingOptions:
    """The operator's options as far as they hold for every family, and the decoding options among them.

    Raises:
        InvalidOptionError: An unknown name, a wrong type or a value out of range.
    """
    own = {name: value for name, value in values.items() if name in SERVER_OPTION_NAMES}
    parse_server_options(own)
    rest = {name: value for name, value in values.items() if name not in own}
    asked = rest.get("cache_mode", rest.get("cache"))
    of_another_family = asked in (BLOCK_CACHE, *CAUSAL_CACHES)
    return parse_options(rest, base=DecodingOptions(cache_mode=asked) if of_another_family else DecodingOptions())


def _check_values(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Each value alone, by the option's present name."""
    changes: dict[str, Any] = {}
    for key, value in values.items():
        name = key.removeprefix(prefix) if key.startswith(prefix) else ""
        if prefix and name in SERVER_OPTION_NAMES:
            raise InvalidOptionError(
                f"{key!r} is for the operator of the server; set {name} in --osdt-config.",
                refusal="operator-option",
                parameter=key,
                value=value,
            )
        if name in FORMER_NAMES:
            name = _present_name(name, prefix, values)
        if name not in DECLARED:
            others = REQUEST_FIELDS if prefix else SERVER_OPTION_NAMES
            own = [prefix + option for option in (*OPTION_NAMES, *others)]
            raise InvalidOptionError(
                f"Unknown option {shown(key)}{meant_or_known(key, own)}; `vllm-osdt options` explains them.",
                refusal="unknown-option",
                parameter=key,
                value=value,
            )
        changes[name] = DECLARED[name].check(key, value)
    for name, value in changes.items():
        other = DECLARED[name].excludes
        if value is not None and changes.get(other) not in (None, False):
            raise InvalidOptionError(
                f"{prefix}{name} is {value} and {prefix}{other} {changes[other]}; send one of them.",
                refusal="excludes",
                parameter=f"{prefix}{name}",
                value=value,
            )
    return changes


def _present_name(former: str, prefix: str, values: Mapping[str, Any]) -> str:
    """The name that replaced one of the last release; says so once in the log.

    Raises:
        InvalidOptionError: Both are given.
    """
    name = FORMER_NAMES[former]
    if prefix + name in values:
        raise InvalidOptionError(
            f"{prefix}{former} and {prefix}{name} are the same option; send {prefix}{name} alone.",
            refusal="two-names",
            parameter=prefix + former,
            value=values[prefix + former],
        )
    if former not in _warned:
        _warned.add(former)
        logger.warning("The option %r is now called %r; the old name is accepted until the next release.", former, name)
    return name


def _with_changes(base: DecodingOptions, changes: Mapping[str, Any]) -> DecodingOptions:
    """What was asked for, and the defaults that still hold beside it.

    Without those that the changes replace in another form, and those that mean something else to another policy than
    the one they were set for.
    """
    dropped = {DECLARED[name].excludes for name, value in changes.items() if value is not None} - {""}
    policy = changes.get("policy", base.policy)
    if policy != base.policy:
        for name, one in DECLARED.items():
            if not one.follows_policy and {policy, base.policy} <= set(policies_of(name)):
                dropped.add(name)
        dropped |= {one.name for one in MODIFIERS if not one.goes_with(POLICIES[policy])}
    others = {name: one.excludes for name, one in DECLARED.items()}
    dropped |= {name for name, other in others.items() if changes.get(other) not in (None, False)}
    changed = replace(base, **{**{name: DEFAULTS[name] for name in dropped}, **changes})
    if changed.looks_at_entropy and not base.looks_at_entropy:
        changed = replace(changed, edit_threshold=changes.get("edit_threshold", DEFAULTS["edit_threshold"]))
    return changed


def _check_composed(options: DecodingOptions, asked: Mapping[str, Any], prefix: str) -> None:
    """Whoever asks for a profile's thresholds must ask for a policy that they mean something to.

    An operator may set them for requests that name another policy than ``osdt``.
    """
    composed = policies_of("calibrated")
    is_default = not prefix and asked.get("policy", "osdt") == "osdt"
    if asked.get("calibrated") and options.policy not in composed and not is_default:
        raise InvalidOptionError(
            f"{prefix}calibrated is True, but policy {options.policy!r} takes no threshold of a profile by it: "
            f"{POLICIES[options.policy].with_profile.replace('`', '')}. Leave it out, or choose one of "
            f"{', '.join(composed)}.",
            refusal="calibrated-policy",
            parameter=f"{prefix}calibrated",
            value=True,
        )


def _check_used(options: DecodingOptions, asked: Mapping[str, Any]) -> None:
    """What a request asks for must mean something to its policy, and to a request without a task."""
    if options.task is None and options.calibrates:
        for name, value in asked.items():
            is_osdt = name == "policy" and "calibrated" not in asked
            remedy = f"leave {PREFIX}{name} out"
            if is_osdt and POLICIES[options.policy].name != "osdt":
                remedy = f"{PREFIX}calibrated = false"
            if is_osdt or (DECLARED[name].needs_task and value != DEFAULTS[name]):
                raise InvalidOptionError(
                    f"{PREFIX}{name} is {value!r}, but the request names no task, so that nothing is calibrated for "
                    f"it and it is decoded with the static threshold: send {PREFIX}task, or {remedy}.",
                    refusal="needs-task",
                    parameter=PREFIX + name,
                    value=value,
                )
    for name, value in asked.items():
        if name in declarations(AdaBlockOptions) and not options.adablock and value != DEFAULTS[name]:
            raise InvalidOptionError(
                f"{PREFIX}{name} is {value!r}, but {PREFIX}adablock is false; leave it out or send {PREFIX}adablock.",
                refusal="adablock-off",
                parameter=PREFIX + name,
                value=value,
            )
        policies = policies_of(name)
        is_used = options.policy in policies or (name in declarations(OSDTOptions) and options.calibrates)
        if not is_used and value != DEFAULTS[name]:
            *others, last = map(repr, policies)
            named = f"{', '.join(others)} or {last}" if others else last
            raise InvalidOptionError(
                f"{PREFIX}{name} is {value!r}, which policy {options.policy!r} does not use: leave it out, or send "
                f"{PREFIX}policy = {named}.",
                refusal="policy-does-not-use",
                parameter=PREFIX + name,
                value=value,
            )
        if name in POLICIES[options.policy].without_use(options) and value != DEFAULTS[name]:
            raise InvalidOptionError(
                f"{PREFIX}{name} is {value!r}, which means nothing beside the other options of policy "
                f"{options.policy!r} that are set: leave {PREFIX}{name} out.",
                refusal="needs-option",
                parameter=PREFIX + name,
                value=value,
            )
        needed, _, word = DECLARED[name].needs.partition("=")
        asked_for = getattr(options, needed) if needed else None
        if needed and value != DEFAULTS[name] and (asked_for != word if word else not asked_for):
            wanted = f" = {word or True!r}" if word or asked_for is False else ""
            raise InvalidOptionError(
                f"{PREFIX}{name} is {value!r}, which says nothing without {PREFIX}{needed}{wanted}: send that too, or "
                f"leave {PREFIX}{name} out.",
                refusal="needs-option",
                parameter=PREFIX + name,
                value=value,
            )
