"""Which of vLLM's sampling parameters these model families implement, and within which limits."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from vllm_osdt.errors import InvalidOptionError, shown

if TYPE_CHECKING:
    from vllm.config import StructuredOutputsConfig
    from vllm.sampling_params import SamplingParams

# Sampling parameters that are not implemented, and the values that ask for nothing.
UNSUPPORTED_SAMPLING_PARAMS: dict[str, tuple[Any, ...]] = {
    "prompt_logprobs": (None,),
    "logprob_token_ids": (None, []),
    "prompt_logprob_token_ids": (None,),
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
    "trace_decode_token_ids": (None, []),
}

MAX_LOGPROBS = 128  # of a token; they are kept for every position of every running request's block
MAX_TOKEN_IDS = 1024  # in vLLM's tables of a request: of allowed_token_ids, and of logit_bias and bad_words together
MAX_STOP_TOKEN_IDS = 128  # likewise, where min_tokens is set


GRAMMAR_BACKENDS = ("xgrammar", "guidance")  # that can be led back any number of tokens


def check_grammar(params: "SamplingParams", edit_threshold: float | None, config: "StructuredOutputsConfig") -> None:
    """Refuse what cannot be combined with structured output.

    Args:
        params: As vLLM has completed them: their backend is known once vLLM has verified them.
        edit_threshold: Option of the request.
        config: Of the engine.

    Raises:
        InvalidOptionError: Names what stands in the way, and the remedy.
    """
    asked = params.structured_outputs
    if asked is None or asked.all_constraints_none():
        return
    if edit_threshold is not None:
        raise InvalidOptionError(
            f"edit_threshold is {edit_threshold:g}, but the request asks for structured output: a token that is "
            "written must not change, since those behind it continue it. Send osdt_edit_threshold = null.",
            refusal="grammar-edits",
            parameter="edit_threshold",
            value=edit_threshold,
        )
    if params.ignore_eos:
        raise InvalidOptionError(
            "ignore_eos is set, but structured output ends where its document does. Leave ignore_eos out.",
            refusal="grammar-ignore-eos",
            parameter="ignore_eos",
            value=True,
        )
    if asked._backend not in (None, "auto", *GRAMMAR_BACKENDS):
        raise InvalidOptionError(
            f"Structured output has the backend {asked._backend!r}, which cannot be led back within a block. Start the "
            f"server with structured_outputs_config.backend = {' or '.join(map(repr, GRAMMAR_BACKENDS))}.",
            refusal="grammar-backend",
            parameter="structured_outputs",
        )
    if config.reasoning_parser and not config.enable_in_reasoning:
        raise InvalidOptionError(
            f"Structured output behind the reasoning that parser {config.reasoning_parser!r} finds is not implemented "
            "for this diffusion model. Start the server without a reasoning parser, or with "
            "structured_outputs_config.enable_in_reasoning.",
            refusal="grammar-reasoning",
            parameter="structured_outputs",
        )


# What asks for something that belongs to one state of a block, and the values that do not.
OF_ONE_STATE: dict[str, tuple[Any, ...]] = {
    "structured_outputs": (None,),
    "logprobs": (None,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
}


def check_branches(
    params: "SamplingParams", policy: str, draft: str | None, *, name_of: Callable[[str], str] = str
) -> None:
    """Refuse what a policy that computes several states of a block in one step has no place for.

    Args:
        params: As the request has them.
        policy: Its name.
        draft: What the client calls its draft; None without one.
        name_of: What the client calls a parameter.

    Raises:
        InvalidOptionError: Names the parameter.
    """
    asked = {name: getattr(params, name) for name, neutral in OF_ONE_STATE.items()}
    found = [name_of(name) for name, value in asked.items() if value not in OF_ONE_STATE[name]]
    if draft is not None:
        found.append(draft)
    if found:
        raise InvalidOptionError(
            f"{', '.join(found)} cannot be sent with policy {policy!r}: it computes several states of a block in one "
            "step, and each of them would have its own. Leave it out, or choose another policy.",
            refusal="branches-sampling",
            parameter=found[0],
        )


def check_limits(
    params: "SamplingParams",
    vocabulary: int,
    mask_token_id: int,
    *,
    bans_ends: bool = False,
    name_of: Callable[[str], str] = str,
) -> None:
    """Refuse values of implemented parameters that the worker has no room or no meaning for.

    Args:
        params: As vLLM has completed them; words are tokens where it has a tokenizer.
        vocabulary: Token ids of the model.
        mask_token_id: Never generated.
        bans_ends: Whether no end token may be generated, as in a template.
        name_of: What the client calls a sampling parameter.

    Raises:
        InvalidOptionError: Names the parameter, its value and the limit.
    """
    if params.logprobs is not None and not 0 <= params.logprobs <= MAX_LOGPROBS:
        raise InvalidOptionError(
            f"{name_of('logprobs')} is {params.logprobs}; this diffusion model returns 0 to {MAX_LOGPROBS} of each "
            "token. Send a number in that range.",
            refusal="logprobs-number",
            parameter="logprobs",
            value=params.logprobs,
        )
    if params.bad_words and params.bad_words_token_ids is None:
        raise InvalidOptionError(
            f"bad_words is {shown(params.bad_words)}, but the engine has no tokenizer; send logit_bias instead.",
            refusal="bad-words",
            parameter="bad_words",
            value=params.bad_words,
        )
    for word in params.bad_words_token_ids or ():
        if len(word) > 1:
            raise InvalidOptionError(
                f"bad_words holds {_word_of(word, params)}, which is {len(word)} tokens; it must be one token, since "
                "the positions of a canvas are decided in any order. Ban single tokens, or use stop.",
                refusal="bad-words",
                parameter="bad_words",
                value=params.bad_words,
            )
    banned = {word[0] for word in params.bad_words_token_ids or ()}
    biased, allowed = dict.fromkeys([*(params.logit_bias or ()), *banned]), params.allowed_token_ids or []
    _check_ids("logit_bias", biased, vocabulary)
    _check_ids("allowed_token_ids", allowed, vocabulary)
    if allowed and not set(allowed) - banned - {mask_token_id}:
        raise InvalidOptionError(
            "allowed_token_ids leaves no token: all of them are mask tokens or in bad_words. Allow another one.",
            refusal="allowed-none",
            parameter="allowed_token_ids",
            value=allowed,
        )
    stops = params.all_stop_token_ids
    if (params.min_tokens or bans_ends) and len(stops) > MAX_STOP_TOKEN_IDS:
        raise InvalidOptionError(
            f"min_tokens or a template is sent beside {len(stops)} stop tokens; at most {MAX_STOP_TOKEN_IDS} can be "
            "held back. Send fewer stop_token_ids, or leave min_tokens out.",
            refusal="min-tokens-stops",
            parameter="min_tokens",
            value=params.min_tokens,
        )
    if (params.min_tokens or bans_ends) and allowed and not set(allowed) - set(stops) - banned - {mask_token_id}:
        raise InvalidOptionError(
            f"min_tokens is {params.min_tokens} or the request has a template, but all of allowed_token_ids are stop "
            "tokens, which must not come there; allow another token.",
            refusal="allowed-stops",
            parameter="allowed_token_ids",
            value=allowed,
        )


def _check_ids(name: str, ids: Iterable[int], vocabulary: int) -> None:
    ids = list(ids)
    if len(ids) > MAX_TOKEN_IDS:
        raise InvalidOptionError(
            f"{name} has {len(ids)} tokens; at most {MAX_TOKEN_IDS} are possible. Send fewer.",
            refusal="token-ids-number",
            parameter=name,
            value=len(ids),
        )
    wrong = next((one for one in ids if not 0 <= one < vocabulary), None)
    if wrong is not None:
        raise InvalidOptionError(
            f"{name} has token id {wrong}; this model's are 0 to {vocabulary - 1}. Send one of these.",
            refusal="token-ids-range",
            parameter=name,
            value=wrong,
        )


def _word_of(token_ids: list[int], params: "SamplingParams") -> str:
    """The word that was sent, as far as it can be told."""
    words = params.bad_words or []
    return repr(words[0]) if len(words) == 1 else f"a word of the tokens {token_ids}"
