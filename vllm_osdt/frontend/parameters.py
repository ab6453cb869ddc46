"""Sampling parameters and kinds of request that these models cannot honor: refused, not ignored."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_osdt.errors import InvalidOptionError, shown
from vllm_osdt.frontend.draft import Draft
from vllm_osdt.frontend.sent import name_of
from vllm_osdt.options import PREFIX, DecodingOptions
from vllm_osdt.policies import POLICIES
from vllm_osdt.sampling import UNSUPPORTED_SAMPLING_PARAMS, check_branches

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

PENALTY = "the tokens before a drafted one that it depends on are not decided yet"


def check_sampling_params(params: "SamplingParams") -> None:
    """Refuse sampling parameters that would be ignored.

    Raises:
        InvalidOptionError: Names every such parameter as the client sent it, its value, and the one to send instead.
    """
    refused = []
    for name, neutral in UNSUPPORTED_SAMPLING_PARAMS.items():
        value = getattr(params, name, neutral[0])
        if value in neutral:
            continue
        name = name_of(params, name)
        remedy = "leave it out" if neutral[0] is None else f"send {neutral[0]!r} or leave it out"
        refused.append((name, value, f"{name}={shown(value)} ({remedy})"))
    if any(name in ("echo", "prompt_logprobs") for name, *_ in refused):
        _refuse_prompt_scores(is_echo=name_of(params, "prompt_logprobs") == "echo")
    if refused:
        raise InvalidOptionError(
            f"Not implemented for this diffusion model: {'; '.join(dict.fromkeys(words for *_, words in refused))}.",
            refusal="sampling-parameter",
            parameter=refused[0][0],
            value=refused[0][1],
        )


def _refuse_prompt_scores(*, is_echo: bool) -> None:
    """Refuse to score a prompt, which a harness does for multiple choice; clients often show the message alone."""
    asked = "echo=True with logprobs" if is_echo else "prompt_logprobs"
    raise InvalidOptionError(
        f"{asked} asks for log probabilities of the prompt, but these diffusion models have no next-token "
        "probabilities of a prompt, so nothing can be scored by loglikelihood: leave it out and let the model answer, "
        "with lm-eval in a task of output_type generate_until in place of a multiple-choice (loglikelihood) task.",
        refusal="prompt-scores",
        parameter="echo" if is_echo else "prompt_logprobs",
        value=True if is_echo else None,
    )


def refuse(what: str, parameter: str | None = None) -> None:
    """Refuse a kind of request that these models cannot answer.

    Args:
        what: Its name, as the message begins.
        parameter: The field that asks for it; None where the endpoint does.

    Raises:
        InvalidOptionError: Always.
    """
    raise InvalidOptionError(
        f"{what} is not implemented for this diffusion model: it needs probabilities of the next token alone, but a "
        "canvas is decided many positions at a time; send an ordinary completion.",
        refusal="kind-of-request",
        parameter=parameter,
    )


def check_policy(
    options: DecodingOptions,
    draft: Draft | None,
    params: "SamplingParams",
    asked: "SamplingParams",
    named: Callable[[str], str] = str,
) -> None:
    """Refuse parameters that a request's policy has no place for.

    Args:
        options: Of the request.
        draft: Of the request.
        params: Its sampling parameters, as vLLM has completed them.
        asked: The same, as they came.
        named: What the client calls a parameter.

    Raises:
        InvalidOptionError: Names the parameter.
    """
    if POLICIES[options.policy].has_branches:
        check_branches(params, options.policy, None if draft is None else draft.name, name_of=named)
    if POLICIES[options.policy].verifies:
        check_verification(options, draft, asked)


def barred_policies(
    options: DecodingOptions, draft: Draft | None, params: "SamplingParams", asked: "SamplingParams"
) -> tuple[str, ...]:
    """The policies that have no place for a request's parameters, so that its task's profile cannot choose them."""

    def is_refused(policy: str) -> bool:
        try:
            check_policy(replace(options, policy=policy), draft, params, asked)
        except InvalidOptionError:
            return True
        return False

    return tuple(name for name, one in POLICIES.items() if (one.has_branches or one.verifies) and is_refused(name))


def check_verification(options: DecodingOptions, draft: Draft | None, asked: "SamplingParams") -> None:
    """Refuse parameters that a verification cannot honor.

    Raises:
        InvalidOptionError: Names the parameter.
    """
    others: dict[str, Any] = {
        "structured_outputs": asked.structured_outputs is not None and "a grammar does not know drafted tokens",
        "presence_penalty": asked.presence_penalty != 0 and PENALTY,
        "frequency_penalty": asked.frequency_penalty != 0 and PENALTY,
        "repetition_penalty": asked.repetition_penalty != 1 and PENALTY,
    }
    if options.steps is not None or options.steps_per_block is not None:
        reason = "a step that unmasks a number of positions may leave a verification's tokens for drafted ones"
        others["logprobs"] = asked.logprobs is not None and reason
        others[PREFIX + "return_trace"] = options.return_trace and reason
    if draft is not None:
        others[draft.name] = "the model drafts for itself"
    for name, reason in others.items():
        if reason:
            raise InvalidOptionError(
                f"{name} cannot be sent with policy {options.policy!r}: {reason}. Leave it out, or choose another "
                "policy.",
                refusal="verify-company",
                parameter=name,
            )
