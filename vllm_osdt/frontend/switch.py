"""The end of thinking: which token it is, what takes its place, and what such a request cannot be combined with."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_osdt.errors import InvalidOptionError, shown
from vllm_osdt.frontend.draft import Draft
from vllm_osdt.frontend.infill import Reader, Template
from vllm_osdt.geometry import Canvas
from vllm_osdt.messages import Switch
from vllm_osdt.options.canvas import answer_options, resolve_answer
from vllm_osdt.policies import POLICIES
from vllm_osdt.policies.tccf import THINK_END

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

    from vllm_osdt.options import DecodingOptions, ServerOptions

LENGTH, TOKEN, CHECK = "answer_block_length", "think_end_token", "check_prompt"


def read_switch(
    options: "DecodingOptions",
    reader: Reader,
    params: "SamplingParams",
    asked: "SamplingParams",
    template: Template | None,
    draft: Draft | None,
    name_of: Callable[[str], str] = str,
) -> Switch | None:
    """What happens when a request has ended its thinking; None where nothing does.

    Args:
        options: Of the request.
        reader: Of texts and token ids.
        params: Its sampling parameters.
        asked: The same as they came.
        template: What is pinned in its output.
        draft: Of its output.
        name_of: What the client calls a sampling parameter.

    Raises:
        InvalidOptionError: A token cannot be read or ends the output, or something else does not go with a switch.
    """
    if options.answer_block_length is None:
        return None
    think_end = _think_end(options.think_end_token, reader)
    ends = {*(params.stop_token_ids or ()), *([] if params.ignore_eos else [params.eos_token_id])}
    if think_end in ends or think_end == reader.mask_token_id:
        reason = "is the mask token" if think_end == reader.mask_token_id else "ends the output"
        raise _refuse(TOKEN, options.think_end_token, f"token {think_end} {reason}; send another one")
    check = [] if options.check_prompt is None else reader.ids_of(options.check_prompt)
    if check is None:
        kinds = f"a list of token ids below {reader.vocabulary}"
        if reader.encode is not None:
            kinds = f"text or {kinds}"
        raise _refuse(CHECK, options.check_prompt, f"expected {kinds}")
    if ends & set(check):
        raise _refuse(CHECK, options.check_prompt, "it has a token that ends the output; leave that out")
    others = {
        "a template": (None if template is None else template.name, "nothing may be added to it"),
        "a draft": (None if draft is None else draft.name, "its tokens have places that the check prompt moves"),
        "structured_outputs": (
            asked.structured_outputs is not None and "structured_outputs",
            "a grammar does not know of thinking",
        ),
        "logprobs": (asked.logprobs is not None and check and "logprobs", "no step chooses a token of a check prompt"),
    }
    for parameter, reason in others.values():
        if parameter:
            raise InvalidOptionError(
                f"{name_of(parameter)} cannot be sent with {LENGTH}: {reason}. Leave it out, or send {LENGTH} null.",
                refusal="switch-company",
                parameter=parameter,
            )
    return Switch(think_end, check)


def check_answer(
    options: "DecodingOptions",
    canvas: Canvas,
    prompt_length: int,
    switch: Switch,
    operator: "ServerOptions",
    max_tokens_name: str = "max_tokens",
) -> None:
    """Refuse what would only be found out when the answer begins.

    Args:
        options: Of the request, resolved.
        canvas: Of the request.
        prompt_length: Prompt tokens.
        switch: Of the request.
        operator: The operator's options.
        max_tokens_name: What the client calls its limit.

    Raises:
        InvalidOptionError: The check prompt leaves no room, or the policy has no blocks of the answer's length.
    """
    num_output, length = canvas.max_output_end - prompt_length, options.answer_block_length
    if num_output <= len(switch.check_prompt):
        raise InvalidOptionError(
            f"{CHECK} has {len(switch.check_prompt)} tokens, which are part of the output, but that has at most "
            f"{num_output}; shorten it or raise {max_tokens_name}.",
            refusal="switch-room",
            parameter=CHECK,
        )
    try:
        own = answer_options(options)
        POLICIES[own.policy].check_operator(own, operator)
        resolve_answer(options, canvas, prompt_length)
    except InvalidOptionError as error:
        raise InvalidOptionError(
            f"{LENGTH} is {length}, but blocks of that length are refused ({error}); send null in its place.",
            refusal="switch",
            parameter=LENGTH,
            value=length,
        ) from None


def _think_end(value: int | str | None, reader: Reader) -> int:
    """The token that ends thinking.

    Raises:
        InvalidOptionError: It is no token.
    """
    if isinstance(value, int):
        if value >= reader.vocabulary:
            raise _refuse(TOKEN, value, f"this model's token ids are below {reader.vocabulary}; send one of them")
        return value
    text = THINK_END if value is None else value
    found = [] if reader.encode is None else list(reader.encode(text))
    if len(found) != 1:
        raise _refuse(TOKEN, text, f"that is {len(found)} tokens of this model instead of one; send a token id")
    return found[0]


def _refuse(name: str, value: Any, why: str) -> InvalidOptionError:
    return InvalidOptionError(
        f"{name} is {shown(value)}, but {why}.", refusal="switch-token", parameter=name, value=value
    )
