"""Decoding options: names, defaults, validation and how a request's own values meet the server's.

A user writes the same names in three places: ``SamplingParams.extra_args`` and HTTP ``vllm_xargs`` with the prefix
``osdt_`` (one request), ``additional_config={"osdt": {...}}`` and ``--osdt-config '{...}'`` without it (the server's
defaults). At admission everything is resolved into one :class:`DecodingOptions` and stored in the request under
:data:`RESOLVED_KEY`, so scheduler and workers read the same values.
"""

import argparse
import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from vllm_osdt.errors import InvalidOptionError

PREFIX = "osdt_"
RESOLVED_KEY = "osdt_resolved"
AUTO_TASK = "auto"
UNDECIDED_TASK = "auto:undecided"  # too little was seen to name the task
MAX_BLOCK_LENGTH = 128  # the unmask kernel ranks a block in one program

POLICIES = ("osdt", "static_threshold", "factor", "joint_bound", "entropy_bound", "fixed_steps")
BLOCK_CACHE = "block"  # of block-causal models, the only one they have
CANVAS_CACHES = ("none", "prefix", "dual")  # of models whose positions see the whole canvas
CACHE_MODES = (*CANVAS_CACHES, BLOCK_CACHE)
MODES = ("block", "step_block")
METRICS = ("conformal", "mean", "q1", "q2", "q3", "min_whisker")
RECORDS = ("masked", "committed")
DRIFT = ("recalibrate", "warn", "off")

# Sampling parameters that this model family does not implement, and the value that asks for nothing. top_k is 0 or
# -1 when off.
NEUTRAL_SAMPLING: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0,),
    "top_k": (0, -1),
    "min_p": (0.0,),
    "min_tokens": (0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "logit_bias": (None, {}),
    "bad_words": (None, []),
    "allowed_token_ids": (None, []),
    "logprobs": (None,),
    "prompt_logprobs": (None,),
    "logprob_token_ids": (None, []),
    "prompt_logprob_token_ids": (None,),
    "structured_outputs": (None,),
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
    "trace_decode_token_ids": (None, []),
}


@dataclass(frozen=True)
class DecodingOptions:
    """How one request is decoded.

    Attributes:
        task: Name of the task whose calibration profile the request makes or uses; None for no task: the static
            threshold, since a profile of other traffic could cost accuracy. ``auto``: found by the prompt's beginning.
        policy: Which masked positions a denoising step unmasks: ``osdt``, ``static_threshold``, ``factor``,
            ``joint_bound``, ``entropy_bound``, ``fixed_steps``.
        threshold: Confidence in (0, 1] of the static threshold; also the threshold of an OSDT calibration.
        factor: Parameter f > 0 of the factor rule.
        delta: Parameter in [0, 1) of the joint bound.
        entropy: Of ``entropy_bound``, > 0: what the entropies of the positions unmasked together stay below, in nats.
        steps: Total denoising steps of ``fixed_steps``; None means one token per step. Of ``static_threshold``, at most
            so many: a step unmasks at least as many positions as ``fixed_steps`` would (dynamic rule of SDAR, LLaDA2).
        steps_per_block: The same for each block, whatever their number; in place of ``steps``.
        block_length: Positions denoised together, 1 to 128.
        gen_length: Canvas length in tokens, a multiple of ``block_length``; None means ``max_tokens`` rounded up, or
            the server's default for a request without a limit (``resolve_canvas``). A block-causal model's canvas
            begins where the prompt's last, incomplete block does. Once resolved, the last block may be cut by the end
            of the context.
        cache: KV cache mode: ``none`` (recompute all), ``prefix`` or ``dual`` (arXiv 2505.22618, section 3); ``block``
            (finished blocks stay), the one of block-causal models.
        mode: Calibrated thresholds per ``block`` or per block and step, ``step_block``.
        metric: What turns recorded confidences into a threshold: ``conformal``, or a statistic of the paper.
        risk: Of ``conformal``, in (0, 1): the share of requests that may see a wrong proposal pass in a block.
        margin: Of ``conformal``, in [0, 1): its threshold T becomes 1 - (1 - T)(1 - margin), for wrong proposals that
            are a little surer than any that was seen.
        calibrations: Requests of a task that calibrate it, 1 to 1024; ``conformal`` needs 1 / risk - 1 of them.
        cap: Upper bound kappa in (0, 1] of a calibrated threshold.
        slack: Relative slack epsilon in [0, 1): the threshold used is min(T, cap) * (1 - slack), but at least floor.
        floor: Lower bound in [0, 1] of the threshold used; guards against a calibrating request that was unsure.
        edit_threshold: Of models trained for it (LLaDA2.1): confidence in [0, 1) above which a written token is
            replaced by another; None for no editing.
        sub_block_length: Of Fast-dLLM v2: positions of a block that are denoised together, from left to right; a
            divisor of ``block_length``, None for its own 8.
        sub_block_cache: Of Fast-dLLM v2: whether a step computes the active sub-block alone where it can, against the
            keys and values that the rest of the block had when it was last computed whole ("dual cache").
        record: Which confidences a calibration records: all ``masked`` positions or only the ``committed`` ones.
        recalibrate: Calibrate again with this request; ``calibrations`` such requests replace the task's profile.
        profile: Id of the profile to use, whatever the task has now; None for the task's own.
    """

    task: str | None = None
    policy: str = "osdt"
    threshold: float = 0.9
    factor: float = 1.0
    delta: float = 0.25
    entropy: float = 0.35
    steps: int | None = None
    steps_per_block: int | None = None
    block_length: int = 32
    gen_length: int | None = None
    cache: str = "dual"
    mode: str = "block"
    metric: str = "conformal"
    risk: float = 0.04
    margin: float = 0.1
    calibrations: int = 32
    cap: float = 0.9
    slack: float = 0.0
    floor: float = 0.0
    edit_threshold: float | None = None
    sub_block_length: int | None = None
    sub_block_cache: bool = False
    record: str = "masked"
    recalibrate: bool = False
    profile: str | None = None

    @property
    def num_blocks(self) -> int:
        """Blocks of the canvas, the last of which may be cut by the end of the context; ``gen_length`` must be set."""
        assert self.gen_length is not None
        return -(-self.gen_length // self.block_length)

    @property
    def cache_key(self) -> str:
        """The cache mode as profiles tell it apart: confidences depend on sub-blocks and on editing too."""
        key = self.cache
        if self.sub_block_length is not None:
            key += f":{self.sub_block_length}{'c' if self.sub_block_cache else ''}"
        if self.edit_threshold is not None:
            key += f":e{self.edit_threshold:g}"
        return key

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain values, to travel in ``extra_args``."""
        return asdict(self)


@dataclass(frozen=True)
class ServerOptions:
    """What the operator alone decides: ``additional_config={"osdt": {...}}`` and ``--osdt-config``, no request.

    Attributes:
        profile_dir: Folder in which calibration profiles outlive the process, shared by engines; None for the user's
            data folder, "" to keep profiles in memory only.
        max_profiles: Profiles that a worker keeps in memory, at least 1.
        drift: What happens when a task's confidences no longer look like its profile: ``recalibrate``, ``warn`` or
            ``off``.
        drift_window: Requests whose mean is compared with the profile, at least 8.
        drift_gap: Mean difference of confidence at block entry, in (0, 1], above which a task has drifted, where it is
            also beyond chance.
        drift_cosine: Cosine similarity with the profile, in [0, 1), below which a task has drifted.
        max_auto_tasks: Tasks that ``task: auto`` may tell apart in one front-end process.
        fused_commit: Whether the forward that writes a finished block's keys and values is also the first denoising
            step of the next one; of block-causal models.
    """

    profile_dir: str | None = None
    max_profiles: int = 256
    drift: str = "recalibrate"
    drift_window: int = 32
    drift_gap: float = 0.03
    drift_cosine: float = 0.95
    max_auto_tasks: int = 256
    fused_commit: bool = True


SERVER_OPTION_NAMES = tuple(field.name for field in fields(ServerOptions))
OPTION_NAMES = tuple(field.name for field in fields(DecodingOptions))


def _choice(choices: tuple[str, ...]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if value not in choices:
            close = did_you_mean(value, choices) if isinstance(value, str) else ""
            raise InvalidOptionError(f"{name} is {value!r}{close}; expected one of {', '.join(choices)}.")
        return value

    return check


def _number(
    low: float, high: float, *, low_open: bool, high_open: bool = False, optional: bool = False
) -> Callable[[str, Any], float | None]:
    bounds = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open or math.isinf(high) else ']'}"

    def check(name: str, value: Any) -> float | None:
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidOptionError(f"{name} is {value!r} ({type(value).__name__}); expected a number in {bounds}.")
        number = float(value)
        above = number > low if low_open else number >= low
        below = number < high if high_open or math.isinf(high) else number <= high
        if not (above and below):
            raise InvalidOptionError(f"{name} is {value!r}; expected a number in {bounds}.")
        return number

    return check


def _count(maximum: int | None = None, *, minimum: int = 1, optional: bool = False) -> Callable[[str, Any], int | None]:
    limit = f"an integer of at least {minimum}" if maximum is None else f"an integer from {minimum} to {maximum}"

    def check(name: str, value: Any) -> int | None:
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidOptionError(f"{name} is {value!r} ({type(value).__name__}); expected {limit}.")
        if value < minimum or (maximum is not None and value > maximum):
            raise InvalidOptionError(f"{name} is {value}; expected {limit}.")
        return value

    return check


def _task(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value or len(value) > 200 or not value.isprintable() or "@" in value:
        raise InvalidOptionError(
            f"{name} is {value!r}; expected 1 to 200 printable characters, none of them @, behind which stands "
            "an adapter's name."
        )
    return value


def _flag(name: str, value: Any) -> bool:
    # JSON booleans arrive as 0 and 1 through the server's vllm_xargs.
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise InvalidOptionError(f"{name} is {value!r}; expected true or false.")


def _profile_id(name: str, value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value)):
        raise InvalidOptionError(f"{name} is {value!r}; expected a profile's id, 16 hexadecimal digits.")
    return value


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "task": _task,
    "policy": _choice(POLICIES),
    "threshold": _number(0, 1, low_open=True),
    "factor": _number(0, math.inf, low_open=True),
    "delta": _number(0, 1, low_open=False, high_open=True),
    "entropy": _number(0, math.inf, low_open=True),
    "steps": _count(optional=True),
    "steps_per_block": _count(MAX_BLOCK_LENGTH, optional=True),
    "block_length": _count(MAX_BLOCK_LENGTH),
    "gen_length": _count(optional=True),
    "cache": _choice(CACHE_MODES),
    "mode": _choice(MODES),
    "metric": _choice(METRICS),
    "risk": _number(0, 1, low_open=True, high_open=True),
    "margin": _number(0, 1, low_open=False, high_open=True),
    "calibrations": _count(1024),
    "cap": _number(0, 1, low_open=True),
    "slack": _number(0, 1, low_open=False, high_open=True),
    "floor": _number(0, 1, low_open=False),
    "edit_threshold": _number(0, 1, low_open=False, high_open=True, optional=True),
    "sub_block_length": _count(MAX_BLOCK_LENGTH, optional=True),
    "sub_block_cache": _flag,
    "record": _choice(RECORDS),
    "recalibrate": _flag,
    "profile": _profile_id,
}


def check_option(name: str, value: Any) -> Any:
    """One decoding option's value, as :func:`parse_options` takes it.

    Raises:
        InvalidOptionError: A wrong type or a value out of range.
    """
    return _CHECKS[name](name, value)


def _folder(name: str, value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or not value.isprintable()):
        raise InvalidOptionError(f'{name} is {value!r}; expected the path of a folder, or "" for none.')
    return value


_SERVER_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "profile_dir": _folder,
    "max_profiles": _count(),
    "drift": _choice(DRIFT),
    "drift_window": _count(minimum=8),
    "drift_gap": _number(0, 1, low_open=True),
    "drift_cosine": _number(0, 1, low_open=False, high_open=True),
    "max_auto_tasks": _count(),
    "fused_commit": _flag,
}


def parse_server_options(values: Mapping[str, Any]) -> ServerOptions:
    """Check what the operator alone decides.

    Raises:
        InvalidOptionError: A wrong type or a value out of range.
    """
    return ServerOptions(**{name: _SERVER_CHECKS[name](name, value) for name, value in values.items()})


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The part of a message that names the known word meant, if one is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def parse_operator_json(text: str) -> dict[str, Any]:
    """What ``--osdt-config`` holds, for argparse. Names and values are checked before anything is loaded; what the
    model's family allows is checked when that is known.

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


def check_operator_values(values: Mapping[str, Any]) -> DecodingOptions:
    """The operator's options as far as they hold for every family, and the decoding options among them.

    Raises:
        InvalidOptionError: An unknown name, a wrong type or a value out of range.
    """
    own = {name: value for name, value in values.items() if name in SERVER_OPTION_NAMES}
    parse_server_options(own)
    rest = {name: value for name, value in values.items() if name not in own}
    base = DecodingOptions(cache=BLOCK_CACHE) if rest.get("cache") == BLOCK_CACHE else DecodingOptions()
    return parse_options(rest, base=base)


def parse_options(values: Mapping[str, Any], *, base: DecodingOptions, prefix: str = "") -> DecodingOptions:
    """Lay ``values`` over ``base``.

    Args:
        values: Option names (each starting with ``prefix``) to values.
        base: What holds for names that ``values`` lacks.
        prefix: ``"osdt_"`` for a request, empty for the server's defaults.

    Raises:
        InvalidOptionError: An unknown name, a wrong type or a value out of range.
    """
    changes = {}
    for key, value in values.items():
        name = key.removeprefix(prefix) if key.startswith(prefix) else ""
        if prefix and name in SERVER_OPTION_NAMES:
            raise InvalidOptionError(f"{key!r} is for the operator of the server; set {name} in --osdt-config.")
        if name not in _CHECKS:
            own = [prefix + option for option in (OPTION_NAMES if prefix else (*OPTION_NAMES, *SERVER_OPTION_NAMES))]
            raise InvalidOptionError(
                f"Unknown option {key!r}{did_you_mean(key, own)}; this model's options are {', '.join(own)}."
            )
        changes[name] = _CHECKS[name](key, value)
    steps = [name for name in ("steps", "steps_per_block") if changes.get(name) is not None]
    if len(steps) == 2:
        raise InvalidOptionError(
            f"{prefix}steps is {changes['steps']} and {prefix}steps_per_block "
            f"{changes['steps_per_block']}; send one of them."
        )
    policy, with_steps = changes.get("policy", base.policy), _POLICIES_OF["steps"]
    if steps or (policy != base.policy and policy in with_steps and base.policy in with_steps):
        # In place of the other one among the defaults; those of the operator's policy mean something else to another.
        base = replace(base, steps=None, steps_per_block=None)
    if policy == "entropy_bound" and base.policy != policy:
        base = replace(base, edit_threshold=None)
    options = replace(base, **changes)
    if prefix:
        _check_used(options, changes)
    _check_conformal(options)
    if (options.cache == BLOCK_CACHE) != (base.cache == BLOCK_CACHE):
        allowed = (BLOCK_CACHE,) if base.cache == BLOCK_CACHE else CANVAS_CACHES
        raise InvalidOptionError(
            f"{prefix}cache is {options.cache!r}; this model's attention allows {', '.join(allowed)}. Leave it out."
        )
    return options


# Options that mean something to some policies only. Those of a task's calibration may stay when a request asks for
# another policy: osdt is switched off by one option. The server's defaults hold for whatever policy is asked for.
_POLICIES_OF = {
    "threshold": ("osdt", "static_threshold"),
    "factor": ("factor",),
    "delta": ("joint_bound",),
    "entropy": ("entropy_bound",),
    **dict.fromkeys(("steps", "steps_per_block"), ("fixed_steps", "static_threshold")),
    "recalibrate": ("osdt",),
}


# Options that say how a task is calibrated, or which profile is used: nothing to a request without a task.
_OF_TASKS = ("mode", "metric", "risk", "margin", "calibrations", "cap", "slack", "floor", "record", "recalibrate",
             "profile")  # fmt: skip


def _check_used(options: DecodingOptions, asked: Mapping[str, Any]) -> None:
    """What a request asks for must mean something to its policy, and to a request without a task."""
    if options.task is None and options.policy == "osdt":
        for name, value in asked.items():
            if name == "policy" or name in _OF_TASKS and value != getattr(DecodingOptions, name):
                raise InvalidOptionError(
                    f"{PREFIX}{name} is {value!r}, but the request names no task, so that nothing is calibrated for "
                    f"it and it is decoded with the static threshold. Send {PREFIX}task, or leave {PREFIX}{name} out."
                )
    for name, value in asked.items():
        policies = _POLICIES_OF.get(name, POLICIES)
        if options.policy not in policies and value != getattr(DecodingOptions, name):
            raise InvalidOptionError(
                f"{PREFIX}{name} is {value!r}, which policy {options.policy!r} does not use. Leave it out, or send "
                f"{PREFIX}policy = {' or '.join(map(repr, policies))}."
            )


def num_requests_needed(risk: float) -> int:
    """The fewest requests k from which the conformal metric gives a threshold: ceil((k + 1)(1 - risk)) <= k."""
    return math.ceil(1 / risk - 1e-9) - 1


def _check_conformal(options: DecodingOptions) -> None:
    """The conformal metric needs enough requests for its risk, and the wrong proposals."""
    if options.metric != "conformal":
        return
    if options.record != "masked":
        raise InvalidOptionError(
            f'record is {options.record!r}; metric "conformal" looks at masked positions that were not committed. '
            'Leave record at "masked", or choose another metric.'
        )
    needed = num_requests_needed(options.risk)
    if options.calibrations < needed:
        raise InvalidOptionError(
            f'calibrations is {options.calibrations}; metric "conformal" with risk {options.risk:g} needs at least '
            f'{needed}. Raise calibrations or risk, or choose another metric, such as "q1".'
        )


DEFAULT_GEN_LENGTH = 256  # canvas of a request without a limit where neither operator nor checkpoint names one


class Limits(NamedTuple):
    """What bounds a canvas.

    Attributes:
        max_model_len: The engine's limit on prompt plus canvas.
        max_num_batched_tokens: The engine's limit on the rows of one step; a refresh has prompt plus canvas rows, a
            step of a block-causal model at most two blocks (its prompt may be cut).
        gen_length: The operator's canvas length, None for none: that of every request that asks for less.
        open_ended: Output tokens of a request that names no limit; None where the checkpoint does not say: then 256
            where positions see the whole canvas, else as many as the context holds.
    """

    max_model_len: int
    max_num_batched_tokens: int
    gen_length: int | None = None
    open_ended: int | None = None

    @property
    def default_length(self) -> int:
        """The canvas of a request that names no limit, where positions see all of it."""
        return self.gen_length or self.open_ended or DEFAULT_GEN_LENGTH


def resolve_canvas(
    options: DecodingOptions,
    *,
    prompt_length: int,
    max_tokens: int | None,
    limits: Limits,
    max_tokens_name: str = "max_tokens",
) -> tuple[DecodingOptions, int]:
    """Fix the canvas length and check that prompt and canvas fit.

    Args:
        options: The request's options; ``gen_length`` is None unless it asks for one itself.
        prompt_length: Prompt tokens.
        max_tokens: The request's limit on output tokens; None when it names none.
        limits: See there.
        max_tokens_name: What the client calls its limit.

    Returns:
        The options with ``gen_length`` (and, for ``fixed_steps``, ``steps``) set, and the output tokens the request
        may get. A canvas is whole blocks; where the context or a forward pass ends sooner, its last block ends there
        too.

    Raises:
        InvalidOptionError: The canvas does not fit, is asked for with a part of a block, or ``steps`` does not divide.
    """
    block = options.block_length
    if options.cache == BLOCK_CACHE:
        _check_block_causal(options, limits.max_num_batched_tokens)
        gen_length, room = _block_causal_canvas(options, prompt_length, max_tokens, limits, max_tokens_name)
    else:
        gen_length = room = _full_attention_canvas(options, prompt_length, max_tokens, limits, max_tokens_name)
    resolved = replace(options, gen_length=gen_length)
    has_quota = options.policy == "static_threshold" and not (options.steps is None and options.steps_per_block is None)
    if options.policy == "fixed_steps" or has_quota:
        resolved = replace(resolved, steps=_resolve_steps(options, resolved.num_blocks * block, max_tokens))
    if max_tokens is None and options.cache != BLOCK_CACHE and options.gen_length is None:
        max_tokens = limits.default_length
    return resolved, room if max_tokens is None else min(max_tokens, room)


def _full_attention_canvas(
    options: DecodingOptions, prompt_length: int, max_tokens: int | None, limits: Limits, name: str
) -> int:
    """The canvas where every position sees all of it: what the request asks for, else what its output needs."""
    block, limit = options.block_length, min(limits.max_model_len, limits.max_num_batched_tokens)
    bound = f"max_model_len {limit}"
    if limit < limits.max_model_len:
        bound = (
            f"max_num_batched_tokens {limit}, which holds both since this model refreshes them at once (the operator "
            "can raise --max-num-batched-tokens)"
        )
    room = limit - prompt_length
    if room < 1:
        raise InvalidOptionError(
            f"The prompt has {prompt_length} tokens and leaves no room for output in {bound}. Shorten the prompt."
        )
    if options.gen_length is not None:
        if options.gen_length % block:
            raise InvalidOptionError(
                f"gen_length is {options.gen_length}, no multiple of block_length {block}; use "
                f"{math.ceil(options.gen_length / block) * block}."
            )
        if options.gen_length > room:
            raise InvalidOptionError(
                f"gen_length is {options.gen_length}, but the prompt of {prompt_length} tokens leaves {room} of "
                f"{bound}. Lower gen_length or shorten the prompt."
            )
        return options.gen_length
    if max_tokens is not None and max_tokens > room:
        raise InvalidOptionError(
            f"{name} is {max_tokens}, but the prompt of {prompt_length} tokens leaves {room} of {bound}. Lower "
            f"{name} or shorten the prompt."
        )
    wanted = limits.default_length if max_tokens is None else max(max_tokens, limits.gen_length or 0)
    return min(math.ceil(wanted / block) * block, room)


def _block_causal_canvas(
    options: DecodingOptions, prompt_length: int, max_tokens: int | None, limits: Limits, name: str
) -> tuple[int, int]:
    """The canvas from the prompt's last, incomplete block on, in whole blocks, and how many of its positions are
    output."""
    block, limit = options.block_length, limits.max_model_len
    origin, end = prompt_length // block * block, limit // block * block
    if prompt_length >= end:
        raise InvalidOptionError(
            f"The prompt has {prompt_length} tokens; its first block of {block} new ones would end at "
            f"{origin + block}, beyond max_model_len {limit}. Shorten the prompt."
        )
    if max_tokens is not None and prompt_length + max_tokens > end:
        raise InvalidOptionError(
            f"{name} is {max_tokens}, but the prompt of {prompt_length} tokens leaves {end - prompt_length} of "
            f"max_model_len {limit} in whole blocks of {block}. Lower {name} or shorten the prompt."
        )
    if max_tokens is None and limits.open_ended is not None:
        max_tokens = min(limits.open_ended, end - prompt_length)
        return math.ceil((prompt_length + max_tokens) / block) * block - origin, max_tokens
    if max_tokens is not None:
        end = math.ceil((prompt_length + max_tokens) / block) * block
    return end - origin, end - prompt_length


def _check_block_causal(options: DecodingOptions, max_num_batched_tokens: int) -> None:
    if 2 * options.block_length > max_num_batched_tokens:
        raise InvalidOptionError(
            f"block_length is {options.block_length}; a step computes up to two blocks, but one forward pass holds "
            f"max_num_batched_tokens {max_num_batched_tokens}. Lower block_length or start the engine with a larger "
            "--max-num-batched-tokens."
        )


def _resolve_steps(options: DecodingOptions, gen_length: int, max_tokens: int | None) -> int:
    """Total denoising steps of the canvas. A user counts blocks of new tokens; a prompt's incomplete last block may
    make one more."""
    block = options.block_length
    num_blocks = gen_length // block
    name = "steps" if options.steps_per_block is None else "steps_per_block"
    steps = getattr(options, name)
    if steps is None:
        return gen_length
    asked = num_blocks
    if name == "steps_per_block":
        asked = 1
    elif options.cache == BLOCK_CACHE and max_tokens is not None:
        asked = math.ceil(max_tokens / block)
    parts = asked * (block // (options.sub_block_length or block))
    if steps % parts or not parts <= steps <= asked * block:
        blocks = f"{asked} block{'s' * (asked > 1)} of {block}"
        if parts > asked:
            blocks += f", each {parts // asked} sub-blocks of {options.sub_block_length},"
        raise InvalidOptionError(
            f"{name} is {steps}; with {blocks} it must be a multiple of {parts} from {parts} to {asked * block}."
        )
    return steps // asked * num_blocks
