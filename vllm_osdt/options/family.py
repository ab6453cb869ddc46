"""What a model's family allows: the rules between options and the model that is served."""

from dataclasses import replace

from vllm_osdt.declaration import declarations
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.models.traits import Traits
from vllm_osdt.options import DEFAULTS, OF_MODIFIERS, DecodingOptions
from vllm_osdt.options.canvas import answer_options
from vllm_osdt.policies import POLICIES
from vllm_osdt.policies.early_exit import EarlyExit, is_adaptive


def validate_for_family(options: DecodingOptions, traits: Traits) -> DecodingOptions:
    """Refuse what only other model families have; fill in this one's sub-blocks.

    Raises:
        InvalidOptionError: A canvas length, refreshes, token editing or sub-blocks on a model without, sub-blocks that
            do not fit a block, or a policy that does not go with them.
    """
    _validate_canvas(options, traits)
    _validate_editing(options, traits)
    _validate_cuts(options, traits)
    _validate_branches(options)
    _validate_verification(options, traits)
    _validate_schedule(options, traits)
    sub_block_length = _sub_block_length(options, traits)
    _validate_switch(options, traits)
    return replace(options, sub_block_length=sub_block_length)


def _validate_canvas(options: DecodingOptions, traits: Traits) -> None:
    """Refuse a canvas and refreshes where no block sees a later one.

    Raises:
        InvalidOptionError: Names the option.
    """
    if options.gen_length is not None and traits.is_block_causal:
        raise InvalidOptionError(
            f"gen_length is {options.gen_length}, but no block of this model sees a later one, so a longer canvas "
            "changes nothing: leave it out and send max_tokens.",
            refusal="gen-length-block-causal",
            parameter="gen_length",
            value=options.gen_length,
        )
    for name in ("suffix_window", "ratio_window"):
        value = getattr(options, name)
        if value is not None and options.is_block_causal:
            raise InvalidOptionError(
                f"{name} is {value}, but no block of this model sees a later one: leave it out.",
                refusal="suffix-window-block-causal",
                parameter=name,
                value=value,
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


def _validate_editing(options: DecodingOptions, traits: Traits) -> None:
    """Refuse to replace written tokens where the model or the policy cannot.

    Raises:
        InvalidOptionError: The model was not trained to, or the policy looks at entropies.
    """
    if options.edit_threshold is None:
        return
    if not traits.can_edit:
        raise InvalidOptionError(
            f"edit_threshold is {options.edit_threshold:g}, but this model was not trained to replace tokens that it "
            "has written; leave it out.",
            refusal="edit-model",
            parameter="edit_threshold",
            value=options.edit_threshold,
        )
    if options.looks_at_entropy:
        raise InvalidOptionError(
            f"edit_threshold is {options.edit_threshold:g}, a confidence, but policy {options.policy!r} looks at "
            "entropies; leave it out or choose another policy.",
            refusal="edit-entropy",
            parameter="edit_threshold",
            value=options.edit_threshold,
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
    reasons |= {name: "it looks at every step, and some are left out" for name in OF_MODIFIERS}
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


def _validate_schedule(options: DecodingOptions, traits: Traits) -> None:
    """Refuse schedules of whole blocks where a block is denoised in parts.

    Raises:
        InvalidOptionError: A number of steps for sub-blocks, or a policy that must have whole blocks.
    """
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


def _sub_block_length(options: DecodingOptions, traits: Traits) -> int | None:
    """Positions that are denoised together within a block; None where blocks have no sub-blocks.

    Raises:
        InvalidOptionError: The model has none, or a block is not made of whole ones.
    """
    own = traits.sub_block_length
    if own is None:
        if options.sub_block_length is not None or options.sub_block_cache:
            raise InvalidOptionError(
                f"sub_block_length is {options.sub_block_length}, sub_block_cache {options.sub_block_cache}; this "
                "model's blocks have no sub-blocks: leave both out.",
                refusal="sub-blocks-model",
                parameter="sub_block_cache" if options.sub_block_length is None else "sub_block_length",
                value=options.sub_block_length or options.sub_block_cache,
            )
        return None
    sub_block = own if options.sub_block_length is None else options.sub_block_length
    if options.block_length % sub_block:
        raise InvalidOptionError(
            f"sub_block_length is {sub_block}; it must divide block_length {options.block_length}: send another one.",
            refusal="sub-blocks-divide",
            parameter="sub_block_length",
            value=sub_block,
        )
    return sub_block


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
