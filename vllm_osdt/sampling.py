"""Which of vLLM's sampling parameters these model families implement."""

from typing import Any

# Sampling parameters that are not implemented, and the values that ask for nothing. top_k is 0 or -1 when off.
UNSUPPORTED_SAMPLING_PARAMS: dict[str, tuple[Any, ...]] = {
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
