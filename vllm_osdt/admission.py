"""What happens to a request before it enters the engine: refuse what cannot be honoured, resolve its options.

Runs in the front-end process, so a refusal (ValueError offline, HTTP 400) never reaches the engine.
"""

from typing import TYPE_CHECKING, Any

from vllm_osdt.config import PREFIX, RESOLVED_KEY, parse_options, resolve_canvas
from vllm_osdt.engine_config import server_defaults
from vllm_osdt.errors import InvalidOptionError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

# Sampling parameters that this model family does not implement, and the value that asks for nothing. top_k is 0 or
# -1 when off.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
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


def check_sampling_params(params: "SamplingParams") -> None:
    """Refuse sampling parameters that would be ignored.

    Raises:
        InvalidOptionError: Names every such parameter with its value and the one to send instead.
    """
    refused = []
    for name, neutral in _NEUTRAL.items():
        value = getattr(params, name, neutral[0])
        if value not in neutral:
            refused.append(f"{name}={value!r} (send {neutral[0]!r} or leave it out)")
    if refused:
        raise InvalidOptionError(
            f"Not implemented for this diffusion model: {'; '.join(refused)}. Supported: temperature, seed, stop, "
            "stop_token_ids, max_tokens, n, ignore_eos and the osdt_ options."
        )


def admit(request: "EngineCoreRequest", vllm_config: "VllmConfig") -> None:
    """Resolve a request's options in place.

    Args:
        request: As ``InputProcessor.process_inputs`` made it; its sampling parameters are its own copy.
        vllm_config: The engine's configuration.

    Raises:
        InvalidOptionError: An option is unknown or out of range, or the canvas does not fit.
    """
    params = request.sampling_params
    if params is None or request.prompt_token_ids is None:
        raise InvalidOptionError("This diffusion model takes token prompts and generates text, nothing else.")
    if request.resumable:
        raise InvalidOptionError("Streaming input sessions are not implemented for this diffusion model.")
    extra = dict(params.extra_args or {})
    resolved = extra.pop(RESOLVED_KEY, None)
    if resolved is not None:
        raise InvalidOptionError(f"{RESOLVED_KEY} is set by the server; send the osdt_ options instead.")
    scheduler_config = vllm_config.scheduler_config
    max_model_len = vllm_config.model_config.max_model_len
    prompt_length = len(request.prompt_token_ids)
    # vLLM fills in the rest of the context for a request that names no limit.
    is_open_ended = params.max_tokens is None or params.max_tokens == max_model_len - prompt_length
    options, max_tokens = resolve_canvas(
        parse_options(extra, base=server_defaults(vllm_config), prefix=PREFIX),
        prompt_length=prompt_length,
        max_tokens=None if is_open_ended else params.max_tokens,
        max_model_len=max_model_len,
        max_num_batched_tokens=min(
            scheduler_config.max_num_batched_tokens,
            scheduler_config.max_num_scheduled_tokens or scheduler_config.max_num_batched_tokens,
        ),
    )
    params.max_tokens = max_tokens
    params.extra_args = {RESOLVED_KEY: options.as_dict()}
