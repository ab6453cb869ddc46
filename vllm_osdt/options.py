"""What a user may set: decoding options of a request, options of the operator, and how the two meet.

A user writes the same names in three places: ``SamplingParams.extra_args`` and HTTP ``vllm_xargs`` with the prefix
``osdt_`` (one request), ``additional_config={"osdt": {...}}`` and ``--osdt-config '{...}'`` without it (the operator's
defaults). Options that every policy reads are declared here, the others by their policy (``vllm_osdt.policies``). At
admission everything is resolved into one :class:`DecodingOptions`.
"""

import argparse
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, make_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator

from vllm_osdt.calibration.profile import Choice, cache_key
from vllm_osdt.declaration import Declaration, Flag, count, declarations, defaults, did_you_mean, number, option
from vllm_osdt.errors import InvalidOptionError, shown
from vllm_osdt.geometry import (
    BLOCK_CACHE,
    CACHE_MODES,
    CACHES_OF_FAMILIES,
    CANVAS_CACHES,
    CAUSAL_CACHE,
    CAUSAL_CACHES,
    BlockLength,
    Canvas,
    CanvasRequest,
    Limits,
    block_causal_canvas,
    full_attention_canvas,
    rest_of_canvas,
)
from vllm_osdt.models.traits import Traits
from vllm_osdt.policies import MODIFIERS, POLICIES
from vllm_osdt.policies.adablock import AdaBlockOptions
from vllm_osdt.policies.early_exit import EarlyExit, is_adaptive
from vllm_osdt.policies.osdt import OSDTOptions
from vllm_osdt.policies.tccf import TCCFOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own, whose handlers it uses

PREFIX = "osdt_"
REQUEST_FIELDS = ("infill", "suffix", "draft")  # of a request alone, with the prefix (vllm_osdt.frontend)
AUTO_TASK = "auto"
UNDECIDED_TASK = "auto:undecided"  # too little was seen to name the task


def _is_task(value: str) -> str:
    if not value or len(value) > 200 or not value.isprintable() or "@" in value:
        raise ValueError("no name of a task")
    return value


def _is_path(value: str) -> str:
    if not value.isprintable():
        raise ValueError("no path")
    return value


@dataclass(frozen=True)
class CommonOptions(AdaBlockOptions, TCCFOptions):
    """Options of every policy."""

    task: str | None = option(
        None,
        Annotated[str, AfterValidator(_is_task)] | None,
        "Task whose calibration profile the request makes or uses. `null`: none, the static threshold, since a profile "
        'of other traffic could cost accuracy. `"auto"`: found by the prompt\'s beginning.',
        expected=(
            "1 to 200 printable characters, none of them @, behind which stands an adapter's name, or null for no task"
        ),
    )
    policy: str = option(
        "osdt",
        Literal[tuple(POLICIES)],
        "Which masked positions a denoising step unmasks.",
    )
    block_length: int = option(
        32,
        BlockLength,
        "Positions denoised together.",
        unit="tokens",
        default_text="the checkpoint's, else 32 (SDAR: what its name says, as in `-b32`, else 4)",
    )
    gen_length: int | None = option(
        None,
        count() | None,
        "Length of the canvas, a multiple of `block_length`. A request's own is exact and bounds its output; the "
        "operator's is what others begin with, before they grow. Not for block-causal models, where no block sees a "
        "later one.",
        unit="tokens",
        default_text="what the model is used to, and more when the answer needs it",
    )
    cache_mode: str = option(
        "dual",
        Literal[CACHE_MODES],
        "What is recomputed between refreshes: `none` (everything, always), `prefix` or `dual` (arXiv 2505.22618, "
        "section 3). Block-causal models have `block` (finished blocks stay) and nothing else. "
        "Nemotron-Labs-Diffusion has `causal` (the causal forward that writes a finished block's keys and values gives "
        "the next block's first token) and `causal_fused` (it is the next block's first denoising step, too, and gives "
        "no token of its own).",
        default_text="`dual`; `block` for block-causal models; `causal` for Nemotron-Labs-Diffusion",
        formerly="cache",
    )
    refresh_interval: int = option(
        1,
        count(1, 1024),
        "Of `prefix` and `dual`: prompt and canvas are refreshed when every so many blocks are entered.",
        unit="blocks",
    )
    refresh_confidence: float = option(
        0.0,
        number(ge=0, lt=1),
        "Of `prefix` and `dual`: a step whose mean confidence is below this is followed by a refresh; 0 for never.",
    )
    suffix_window: int | None = option(
        None,
        count(0, 1024) | None,
        "Of `none`, `prefix` and `dual`: of the masks behind the active block, only those of so many blocks take part "
        "in a step (Streaming-dLLM, arXiv 2601.17917, without the last position). `null` for all.",
        unit="blocks",
    )
    edit_threshold: float | None = option(
        None,
        number(ge=0, lt=1) | None,
        "LLaDA2 only: confidence above which a written token is replaced by another; `null` for no editing. LLaDA2.1's "
        "Quality mode is `threshold` 0.7 and 0.5 here, its Speed mode 0.5 and 0.0 or `null`.",
    )
    sub_block_length: int | None = option(
        None,
        BlockLength | None,
        "Fast-dLLM v2 only: positions of a block that are denoised together, from left to right; a divisor of "
        "`block_length`.",
        unit="tokens",
        default_text="the checkpoint's, 8",
    )
    sub_block_cache: bool = option(
        False,
        Flag,
        'Fast-dLLM v2 only: compute the active sub-block alone where the authors\' "dual cache" does, against the keys '
        "and values that the rest of the block had when it was last computed whole.",
    )
    filtered_confidence: bool = option(
        False,
        Flag,
        "A proposal's confidence is its share of the tokens that `top_p`, `top_k`, `min_p`, biases and penalties "
        "leave, instead of the model's own probability. More tokens per forward, and less certain ones.",
    )
    draft_threshold: float = option(
        0.3,
        number(ge=0, le=1),
        "Of a request with a [draft](parameters.md#drafts): confidence that the model has at least in a drafted token "
        "that it proposes itself, for the token to be taken.",
    )
    draft_ngram: int | None = option(
        None,
        count(1, 32) | None,
        "Draft each block from the prompt and the output so far: the tokens behind an earlier occurrence of their last "
        "so many tokens. `null` for no such drafts.",
        unit="tokens",
    )
    return_trace: bool = option(
        False,
        Flag,
        "The response says of every token in which denoising step and forward it was unmasked, and how confident the "
        "model was.",
    )

    @property
    def num_blocks(self) -> int:
        """Blocks of the canvas, the last of which may be cut by the end of the context; ``gen_length`` must be set."""
        assert self.gen_length is not None
        return -(-self.gen_length // self.block_length)

    @property
    def is_block_causal(self) -> bool:
        """Whether they are for a block-causal model, which has a cache mode of its own."""
        return self.cache_mode not in CANVAS_CACHES

    @property
    def is_on_grid(self) -> bool:
        """Whether blocks lie on a grid from position 0; else they begin behind the prompt."""
        return self.cache_mode == BLOCK_CACHE

    @property
    def cache_key(self) -> str:
        """The cache mode, and the modifiers, as profiles tell them apart."""
        return cache_key(
            self.cache_mode,
            sub_block_length=self.sub_block_length,
            sub_block_cache=self.sub_block_cache,
            edit_threshold=self.edit_threshold,
            refresh_interval=self.refresh_interval,
            refresh_confidence=self.refresh_confidence,
            suffix_window=self.suffix_window,
            modifiers=[one.key(self) for one in MODIFIERS if one.is_on(self)],
        )

    @property
    def calibrates(self) -> bool:
        """Whether its policy takes thresholds from the task's profile."""
        return POLICIES[self.policy].calibrates(self)

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain values, to travel between processes."""
        return asdict(self)


def _compose() -> type:
    """One class of the common options and those of every policy and modifier; options of the same name are one."""
    own = dict.fromkeys([*(one.Options for one in MODIFIERS), *(one.Options for one in POLICIES.values())])
    bases = [cls for cls in own if not any(other is not cls and issubclass(other, cls) for other in own)]
    composed = make_dataclass("DecodingOptions", [], bases=(CommonOptions, *bases), frozen=True)
    composed.__module__ = __name__  # where pickle looks for it
    composed.__doc__ = "How one request is decoded: the common options and those of every policy, as attributes."
    return composed


if TYPE_CHECKING:

    class DecodingOptions(CommonOptions):
        """How one request is decoded: the common options and those of every policy, as attributes."""

        def __init__(self, **values: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...
else:
    DecodingOptions = _compose()


@dataclass(frozen=True)
class ServerOptions:
    """What the operator alone decides: ``additional_config={"osdt": {...}}`` and ``--osdt-config``, no request."""

    profile_dir: str | None = option(
        None,
        Annotated[str, AfterValidator(_is_path)] | None,
        'Folder in which calibration profiles outlive the process, shared by engines; `""` keeps them in memory only.',
        expected='the path of a folder, or "" for none',
        default_text="the user's data folder",
    )
    max_profiles: int = option(
        256,
        count(),
        "Profiles that an engine keeps in memory; the one unused for longest makes room.",
        unit="profiles",
    )
    drift: str = option(
        "recalibrate",
        Literal["recalibrate", "warn", "off"],
        "What the guard does about a task that no longer looks like its profile.",
    )
    drift_window: int = option(
        32, count(8), "Requests whose mean confidence is compared with the profile.", unit="requests"
    )
    drift_gap: float = option(
        0.03,
        number(gt=0, le=1),
        "Mean difference of confidence at block entry above which a task has drifted, where it is also beyond chance "
        "(4 standard errors).",
    )
    drift_cosine: float = option(
        0.95, number(ge=0, lt=1), "Cosine similarity with the profile below which a task has drifted."
    )
    audit: float = option(
        0.0,
        number(ge=0, le=1),
        "Share of the greedy requests with a profile that are decoded once more with the static threshold, while no "
        "request waits; nobody gets the result, the guard compares the tokens.",
    )
    audit_agreement: float = option(
        0.9,
        number(gt=0, lt=1),
        "Share of audited requests that must have the tokens of the static threshold. Where significantly fewer have, "
        "the guard does what `drift` says.",
    )
    max_auto_tasks: int = option(
        256, count(), 'Prefixes that `"task": "auto"` tells apart in one front-end process.', unit="tasks"
    )
    filter_file: str | None = option(
        None,
        Annotated[str, AfterValidator(_is_path)] | None,
        "Weights of the policy `learned_filter`, for blocks of the served length; `vllm-osdt train-filter` writes it. "
        "Every process of the engine reads it when it starts. `null`: requests are refused that policy.",
        expected="the path of a file, or null for none",
    )
    fused_commit: bool = option(
        True,
        Flag,
        "SDAR and LLaDA2: the forward that writes a finished block's keys and values is also the first denoising step "
        "of the next block. The tokens are the same either way.",
    )
    run_ahead: bool = option(
        True,
        Flag,
        "On a GPU: where a step's blocks are not expected to be finished by it, the next one is launched behind it, "
        "before its outcome is known. The tokens are the same either way.",
    )
    fused_lm_head: bool = option(
        False,
        Flag,
        "On a GPU: one kernel finds tokens and confidences from hidden states and the output weight, and no logits are "
        "written but for requests that change or ask for them. Saves traffic of memory, and with tensor parallelism "
        "their gathering; its speed is not measured yet. For unquantized output weights without a bias, and no "
        "adapters; refused elsewhere.",
    )


_OF_MODIFIERS = {name: one for modifier in MODIFIERS for name, one in declarations(modifier.Options).items()}
# Of every request, whatever its policy.
_SHARED = declarations(CommonOptions) | _OF_MODIFIERS
DECLARED: dict[str, Declaration] = _SHARED | {
    name: one for policy in POLICIES.values() for name, one in declarations(policy.Options).items()
}
SERVER_DECLARED = declarations(ServerOptions)
OPTION_NAMES = tuple(DECLARED)
SERVER_OPTION_NAMES = tuple(SERVER_DECLARED)
DEFAULTS = defaults(DecodingOptions)
FORMER_NAMES = {one.formerly: name for name, one in DECLARED.items() if one.formerly}
# Options that say how positions are chosen; whoever names one of them does not leave it to the task's profile.
CHOOSING = {"policy", *OPTION_NAMES} - (set(_SHARED) - {"policy"})
CHOOSING -= {"num_calibration_requests", "early", "recalibrate", "profile"}
_warned: set[str] = set()


def choosing(names: Iterable[str], prefix: str = "") -> list[str]:
    """Those of a request's or an operator's names (each with ``prefix``) that say how positions are chosen."""
    own = {name: name.removeprefix(prefix) for name in names}
    return [name for name, option in own.items() if FORMER_NAMES.get(option, option) in CHOOSING]


def with_choice(options: DecodingOptions, choice: Choice) -> DecodingOptions:
    """The options of a request that leaves it to its task's profile how positions are chosen.

    Raises:
        InvalidOptionError: The policy or one of its options is not known here, or they do not go with the request's.
    """
    return parse_options({"policy": choice.policy, **choice.options}, base=options)


def policies_of(name: str) -> tuple[str, ...]:
    """The policies that an option means something to, or with which a request may send it all the same."""
    if name in _SHARED or DECLARED[name].with_any_policy:
        return tuple(POLICIES)
    return _readers(name)


def parse_server_options(values: Mapping[str, Any]) -> ServerOptions:
    """Check what the operator alone decides.

    Raises:
        InvalidOptionError: A wrong type or a value out of range.
    """
    return ServerOptions(**{name: SERVER_DECLARED[name].check(name, value) for name, value in values.items()})


def parse_operator_json(text: str) -> dict[str, Any]:
    """The value of ``--osdt-config``, for argparse.

    Names and values are checked before anything is loaded; what the model's family allows is checked when that is
    known.

    Args:
        text: A JSON object.

    Raises:
        argparse.ArgumentTypeError: Says what is wrong with it.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object, such as {{"threshold": 0.9}}')
    try:
        check_operator_values(values)
    except InvalidOptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return values


class ReferenceRow(NamedTuple):
    """An option as documentation shows it.

    Attributes:
        name: Without the prefix.
        values: Words for the values it may have.
        default: Words for its default.
        meaning: One or two sentences, in Markdown.
        unit: Of a number; "" for none.
        policies: The policies that it means something to; empty for all.
        of_operator: Whether the operator alone may set it.
        formerly: Its name in the last release; "" for the same.
        has_words_for_default: Whether ``default`` is words, where it depends on the model or the request; else JSON.
    """

    name: str
    values: str
    default: str
    meaning: str
    unit: str
    policies: tuple[str, ...]
    of_operator: bool
    formerly: str
    has_words_for_default: bool


def reference_rows() -> list[ReferenceRow]:
    """Every option, in order, for ``vllm-osdt options`` and the documentation."""
    rows = []
    for name, one in {**DECLARED, **SERVER_DECLARED}.items():
        of_operator = name in SERVER_DECLARED
        default = defaults(ServerOptions)[name] if of_operator else DEFAULTS[name]
        owners = () if of_operator or name in _SHARED else _readers(name)
        text = one.default_text or json.dumps(default)
        about = (one.expectation, text, one.meaning, one.unit, owners, of_operator, one.formerly)
        rows.append(ReferenceRow(name, *about, bool(one.default_text)))
    return rows


def _readers(name: str) -> tuple[str, ...]:
    return tuple(policy.name for policy in POLICIES.values() if name in declarations(policy.Options))


def operator_help() -> str:
    """What ``--help`` says of ``--osdt-config``: every name with its values."""
    names = [f"{name} ({one.expectation})" for name, one in {**DECLARED, **SERVER_DECLARED}.items()]
    return (
        'Default decoding options and options of the operator as JSON, e.g. \'{"policy": "osdt", "threshold": 0.9}\'. '
        f"`vllm-osdt options` explains them: {'; '.join(names)}."
    )


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
            own = [prefix + option for option in (OPTION_NAMES if prefix else (*OPTION_NAMES, *SERVER_OPTION_NAMES))]
            raise InvalidOptionError(
                f"Unknown option {shown(key)}{did_you_mean(key, own)}; this model's options are {', '.join(own)}.",
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
    if _looks_at_entropy(changed) and not _looks_at_entropy(base):
        changed = replace(changed, edit_threshold=changes.get("edit_threshold", DEFAULTS["edit_threshold"]))
    return changed


def _looks_at_entropy(options: DecodingOptions) -> bool:
    return POLICIES[options.policy].looks_at_entropy(options)


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


def validate_for_family(options: DecodingOptions, traits: Traits) -> DecodingOptions:
    """Refuse what only other model families have; fill in this one's sub-blocks.

    Raises:
        InvalidOptionError: A canvas length, refreshes, token editing or sub-blocks on a model without, sub-blocks that
            do not fit a block, or a policy that does not go with them.
    """
    if options.gen_length is not None and traits.is_block_causal:
        raise InvalidOptionError(
            f"gen_length is {options.gen_length}, but no block of this model sees a later one, so a longer canvas "
            "changes nothing: leave it out and send max_tokens.",
            refusal="gen-length-block-causal",
            parameter="gen_length",
            value=options.gen_length,
        )
    if options.suffix_window is not None and options.is_block_causal:
        raise InvalidOptionError(
            f"suffix_window is {options.suffix_window}, but no block of this model sees a later one: leave it out.",
            refusal="suffix-window-block-causal",
            parameter="suffix_window",
            value=options.suffix_window,
        )
    if options.is_block_causal or options.cache_mode == "none":
        for name in ("refresh_interval", "refresh_confidence"):
            value = getattr(options, name)
            if value != DEFAULTS[name]:
                reason = "finished blocks of this model need no refresh"
                if not traits.is_block_causal:
                    reason = "with cache_mode 'none' every step is a refresh"
                raise InvalidOptionError(
                    f"{name} is {value}, but {reason}; leave it out.", refusal="refresh", parameter=name, value=value
                )
    if options.edit_threshold is not None and not traits.can_edit:
        raise InvalidOptionError(
            f"edit_threshold is {options.edit_threshold:g}, but this model was not trained to replace tokens that it "
            "has written; leave it out.",
            refusal="edit-model",
            parameter="edit_threshold",
            value=options.edit_threshold,
        )
    if options.edit_threshold is not None and _looks_at_entropy(options):
        raise InvalidOptionError(
            f"edit_threshold is {options.edit_threshold:g}, a confidence, but policy {options.policy!r} looks at "
            "entropies; leave it out or choose another policy.",
            refusal="edit-entropy",
            parameter="edit_threshold",
            value=options.edit_threshold,
        )
    _validate_cuts(options, traits)
    _validate_branches(options)
    _validate_verification(options, traits)
    own = traits.sub_block_length
    steps = options.steps or options.steps_per_block
    exits = isinstance(POLICIES[options.policy], EarlyExit)
    is_fixed = options.policy == "fixed_steps" or (options.policy == "freedave" and options.freedave_base == "steps")
    has_least = not is_fixed and "steps" in declarations(POLICIES[options.policy].Options)
    if own is not None and has_least and steps is not None and (is_adaptive(options) or not exits):
        raise InvalidOptionError(
            f"steps is {steps}; with policy {options.policy!r} this model's sub-blocks take as many steps as they "
            "need: leave it out, or choose policy 'fixed_steps'.",
            refusal="sub-blocks-steps",
            parameter="steps" if options.steps else "steps_per_block",
            value=steps,
        )
    if POLICIES[options.policy].needs_whole_blocks and (own is not None or options.adablock):
        reason = "adablock cuts blocks" if own is None else "this model decides the sub-blocks of a block one by one"
        raise InvalidOptionError(
            f"policy is {options.policy!r}, whose schedule is one of whole blocks, but {reason}: choose another.",
            refusal="whole-blocks",
            parameter="policy",
            value=options.policy,
        )
    if own is None:
        if options.sub_block_length is not None or options.sub_block_cache:
            raise InvalidOptionError(
                f"sub_block_length is {options.sub_block_length}, sub_block_cache {options.sub_block_cache}; this "
                "model's blocks have no sub-blocks: leave both out.",
                refusal="sub-blocks-model",
                parameter="sub_block_cache" if options.sub_block_length is None else "sub_block_length",
                value=options.sub_block_length or options.sub_block_cache,
            )
        _validate_switch(options, traits)
        return options
    sub_block = own if options.sub_block_length is None else options.sub_block_length
    if options.block_length % sub_block:
        raise InvalidOptionError(
            f"sub_block_length is {sub_block}; it must divide block_length {options.block_length}: send another one.",
            refusal="sub-blocks-divide",
            parameter="sub_block_length",
            value=sub_block,
        )
    _validate_switch(options, traits)
    return replace(options, sub_block_length=sub_block)


def _validate_branches(options: DecodingOptions) -> None:
    """Refuse what a step of several states of a block would change for a policy that has them.

    Raises:
        InvalidOptionError: Names the option.
    """
    if not POLICIES[options.policy].has_branches:
        return
    reasons: dict[str, str] = {
        "edit_threshold": "a token that may be replaced is no part of a state that is decided",
        "refresh_confidence": "which step is followed by a refresh depends on steps that are left out",
        "sub_block_cache": "keys and values of the rest of the block are those of a step that may be left out",
        "draft_ngram": "a step from each state would need drafts of its own",
    }
    reasons |= {name: "it looks at every step, and some are left out" for name in _OF_MODIFIERS}
    for name, reason in reasons.items():
        value = getattr(options, name)
        if value != DEFAULTS[name]:
            raise InvalidOptionError(
                f"{name} is {value!r}, but policy {options.policy!r} computes several states of a block in one step: "
                f"{reason}. Leave it out, or choose another policy.",
                refusal="branches",
                parameter=name,
                value=value,
            )


def _validate_verification(options: DecodingOptions, traits: Traits) -> None:
    """Refuse verifications where a model has no order from left to right, and what they cannot stand beside.

    Raises:
        InvalidOptionError: Names the option.
    """
    if not POLICIES[options.policy].verifies:
        return
    if not traits.is_block_causal:
        raise InvalidOptionError(
            f"policy is {options.policy!r}, but every position of this model's canvas sees all others, so the model "
            "says nothing from left to right that could verify a draft: choose another.",
            refusal="verify-model",
            parameter="policy",
            value=options.policy,
        )
    others = {
        "edit_threshold": options.edit_threshold is not None and "a token that was verified must not change",
        "sub_block_cache": options.sub_block_cache and "a verification overwrites its keys and values",
        "draft_ngram": options.draft_ngram is not None and "the model drafts for itself",
        "cache_mode": options.cache_mode == "causal_fused" and "no pass of its own gives the first position of a block",
    }
    for name, reason in others.items():
        if reason:
            value = getattr(options, name)
            raise InvalidOptionError(
                f"{name} is {value!r}, but policy {options.policy!r} verifies drafts, and {reason}: leave it out.",
                refusal="verify-company",
                parameter=name,
                value=value,
            )


def _validate_cuts(options: DecodingOptions, traits: Traits) -> None:
    """Refuse blocks that are cut where they cannot be.

    Raises:
        InvalidOptionError: A block-causal model, refreshes of every so many blocks, or two things that cut.
    """
    policy_cuts = POLICIES[options.policy].cuts_blocks
    if not (options.adablock or policy_cuts):
        return
    name, what = ("adablock", "adablock is true") if options.adablock else ("policy", f"policy is {options.policy!r}")
    if options.adablock and policy_cuts:
        raise InvalidOptionError(
            f"adablock is true, but policy {options.policy!r} says itself how long blocks are; send adablock = false.",
            refusal="adablock-policy",
            parameter="adablock",
            value=True,
        )
    if options.adablock and options.task is not None and options.calibrates:
        raise InvalidOptionError(
            f"adablock is true, but the thresholds of task {options.task!r} are for blocks of one length; send "
            "adablock = false, or no task.",
            refusal="adablock-task",
            parameter="adablock",
            value=True,
        )
    if traits.is_block_causal:
        raise InvalidOptionError(
            f"{what}, but this model's blocks, which see no later ones, have one length; leave it out.",
            refusal="cut-block-causal",
            parameter=name,
            value=getattr(options, name),
        )
    if options.refresh_interval > 1:
        raise InvalidOptionError(
            f"{what} and refresh_interval {options.refresh_interval}, but blocks of different lengths are refreshed "
            "when they are entered; send refresh_interval = 1.",
            refusal="cut-refresh",
            parameter="refresh_interval",
            value=options.refresh_interval,
        )


def _validate_switch(options: DecodingOptions, traits: Traits) -> None:
    """Refuse another block length for the answer where it cannot be.

    Raises:
        InvalidOptionError: It divides no block, a calibrated task has thresholds for one length, steps are shared out
            among all blocks, or the model or the policy has no such blocks.
    """
    length = options.answer_block_length
    if length is None:
        return
    reason = remedy = ""
    if options.block_length % length:
        reason, remedy = f"it divides block_length {options.block_length} not", "send a divisor, such as 1"
    elif traits.commits_causally and length > 1:
        reason, remedy = "this model's blocks begin behind what is written, and might end behind the context", "send 1"
    elif options.task is not None and options.calibrates:
        reason = f"the thresholds of task {options.task!r} are for blocks of one length"
        remedy = "send null in its place, or no task"
    elif options.steps is not None:
        reason = f"steps {options.steps} are shared out among blocks of one length"
        remedy = "send null in its place, or steps_per_block"
    if not reason:
        try:
            validate_for_family(answer_options(options), traits)
        except InvalidOptionError as error:
            reason, remedy = f"blocks of that length are refused ({error})", "send null in its place"
    if reason:
        raise InvalidOptionError(
            f"answer_block_length is {length}, but {reason}; {remedy}.",
            refusal="switch",
            parameter="answer_block_length",
            value=length,
        )


def answer_options(options: DecodingOptions) -> DecodingOptions:
    """The options of what follows the end of thinking, before they are resolved; ``answer_block_length`` is set."""
    length, steps = options.answer_block_length, options.steps_per_block
    own = {name: DEFAULTS[name] for name in declarations(TCCFOptions)}
    own |= {"block_length": length, "gen_length": None, "steps": None}
    own["steps_per_block"] = None if steps is None else min(steps, length)
    return replace(options, **own)


def resolve_answer(options: DecodingOptions, canvas: Canvas, position: int) -> tuple[DecodingOptions, Canvas]:
    """Options and canvas from the end of thinking on, as of a request whose prompt ends there.

    Args:
        options: Of the request; ``answer_block_length`` is set.
        canvas: Of the request.
        position: Where the answer begins.

    Raises:
        InvalidOptionError: The policy has no blocks of that length.
    """
    own = answer_options(options)
    rest = rest_of_canvas(
        canvas,
        position,
        own.block_length,
        is_block_causal=own.is_block_causal,
        is_on_grid=own.is_on_grid,
    )
    asked = CanvasRequest(
        position,
        canvas.max_output_end - position,
        None,
        own.block_length,
        sub_block_length=own.sub_block_length,
        is_block_causal=own.is_block_causal,
        is_on_grid=own.is_on_grid,
    )
    resolved = POLICIES[own.policy].resolve(own, asked, rest)
    return replace(own, gen_length=rest.length, **resolved), rest


def resolve_canvas(
    options: DecodingOptions,
    *,
    prompt_length: int,
    max_tokens: int | None,
    limits: Limits,
    max_tokens_name: str = "max_tokens",
    canvas: Canvas | None = None,
) -> tuple[DecodingOptions, Canvas]:
    """Fix the canvas and check that prompt and canvas fit.

    Args:
        options: The request's options; ``gen_length`` is None unless it asks for one itself.
        prompt_length: Prompt tokens.
        max_tokens: The request's limit on output tokens; None when it names none.
        limits: See there.
        max_tokens_name: What the client calls its limit.
        canvas: The canvas, where it is known already.

    Returns:
        The options with ``gen_length``, and what the policy makes of it (``steps``), and the canvas. A canvas is whole
        blocks; where the context or a forward pass ends sooner, its last block ends there too.

    Raises:
        InvalidOptionError: The canvas does not fit, is asked for with a part of a block, or ``steps`` does not divide.
    """
    asked = CanvasRequest(
        prompt_length,
        max_tokens,
        options.gen_length,
        options.block_length,
        max_tokens_name,
        options.sub_block_length,
        options.is_block_causal,
        can_grow=options.steps is None,  # which is shared out among all blocks
        is_on_grid=options.is_on_grid,
    )
    if canvas is None:
        find = block_causal_canvas if options.is_block_causal else full_attention_canvas
        canvas = find(asked, limits)
    resolved = POLICIES[options.policy].resolve(options, asked, canvas)
    return replace(options, gen_length=canvas.length, **resolved), canvas


def operator_values(vllm_config: "VllmConfig") -> dict[str, Any]:
    """The operator's own values, unchecked."""
    additional = vllm_config.additional_config
    return dict(additional.get("osdt", {})) if isinstance(additional, dict) else {}


def default_decoding_options(vllm_config: "VllmConfig") -> DecodingOptions:
    """The options of a request that sets none: ours, the checkpoint's block length, then the operator's.

    Raises:
        InvalidOptionError: ``additional_config["osdt"]`` has an unknown name or a bad value.
    """
    traits: Traits = vllm_config.model_config.hf_config.traits
    base = DecodingOptions(block_length=traits.block_length)
    if traits.is_block_causal:
        base = replace(base, cache_mode=CAUSAL_CACHE if traits.commits_causally else BLOCK_CACHE)
    values = operator_values(vllm_config)
    values = {name: values[name] for name in values if name not in SERVER_OPTION_NAMES}
    return validate_for_family(parse_options(values, base=base), traits)


def server_options(vllm_config: "VllmConfig") -> ServerOptions:
    """What the operator alone decides.

    Raises:
        InvalidOptionError: A bad value.
    """
    values = operator_values(vllm_config)
    return parse_server_options({name: values[name] for name in values if name in SERVER_OPTION_NAMES})


def canvas_limits(vllm_config: "VllmConfig", gen_length: int | None) -> Limits:
    """What bounds the canvases of an engine.

    Args:
        vllm_config: The engine's configuration.
        gen_length: The operator's.
    """
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    max_num_batched_tokens = scheduler.max_num_batched_tokens
    return Limits(
        max_model_len=model.max_model_len,
        max_num_batched_tokens=min(
            max_num_batched_tokens, scheduler.max_num_scheduled_tokens or max_num_batched_tokens
        ),
        gen_length=gen_length,
        # max_new_tokens, the operator's or the checkpoint's
        open_ended=model.get_diff_sampling_param().get("max_tokens"),
        usual_length=model.hf_config.traits.gen_length,
    )
