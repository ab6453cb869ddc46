"""How our refusals leave vLLM: as its own kind of error, and before an answer begins."""

import functools
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from copy import copy
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger

from vllm_osdt.errors import InvalidOptionError, OSDTError
from vllm_osdt.messages import ERROR, KEY
from vllm_osdt.options import OPTION_NAMES, PREFIX

logger = init_logger(f"vllm.{__name__}")


class RefusedRequestError(VLLMValidationError, ValueError):
    """A refusal as vLLM's own kind, which its server answers with HTTP 400; the message has parameter and value."""

    def __init__(self, message: str, *, parameter: str | None = None, value: Any = None) -> None:
        VLLMValidationError.__init__(self, message, parameter=parameter, value=value)

    def __str__(self) -> str:
        return ValueError.__str__(self)


@contextmanager
def http_400() -> Iterator[None]:
    """Our refusals leave as a ValueError that is also vLLM's own kind, an option by the name that a request has."""
    try:
        yield
    except InvalidOptionError as error:
        parameter = PREFIX + error.parameter if error.parameter in OPTION_NAMES else error.parameter
        raise RefusedRequestError(str(error), parameter=parameter, value=error.value) from error
    except OSDTError as error:
        raise RefusedRequestError(str(error)) from error


def encoder(tokenizer: Any) -> Callable[[str], list[int]] | None:
    """Text to token ids, as the text stands there."""
    return None if tokenizer is None else functools.partial(tokenizer.encode, add_special_tokens=False)


def refuse_early(check: Any, engine: Any, prompt: Any, params: Any, lora_request: Any) -> None:
    """Refuse a request now, with one line in the log; vLLM's own checks of its parameters follow ours."""
    try:
        if params.bad_words and engine.renderer.tokenizer is not None:
            params = copy(params)
            params.update_from_tokenizer(engine.renderer.tokenizer)
        with http_400():
            check(
                _with_ends(engine, params),
                prompt,
                lora_request,
                engine.vllm_config,
                encoder(engine.renderer.tokenizer),
                asked=params,
            )
        params.verify(
            engine.model_config,
            engine.vllm_config.speculative_config,
            engine.vllm_config.structured_outputs_config,
            engine.renderer.tokenizer,
        )
    except VLLMValidationError as error:
        logger.info("Refused a request: %s", error)
        raise


def _with_ends(engine: Any, params: Any) -> Any:
    """A copy of sampling parameters with what ends the output, EOS and the checkpoint's others, as vLLM adds it."""
    own, params = params, copy(params)
    params.stop_token_ids, params._all_stop_token_ids = list(own.stop_token_ids or ()), set(own.all_stop_token_ids)
    fields = engine.input_processor.generation_config_fields
    params.update_from_generation_config(fields, engine.renderer.get_eos_token_id())
    return params


async def refusing_failed(results: Any, parameter: str) -> Any:
    """The results of a request; one that its own parameters left no token for its grammar is refused like others."""
    async with aclosing(results):
        async for result in results:
            for output in result.outputs:
                reason = (getattr(output, KEY) or {}).get(ERROR)
                if reason is not None:
                    logger.info("Refused a request: %s", reason)
                    raise RefusedRequestError(reason, parameter=parameter)
            yield result
