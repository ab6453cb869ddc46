"""What an HTTP client sent, where vLLM's sampling parameters no longer tell, and by which names."""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vllm_osdt.errors import InvalidOptionError, shown
from vllm_osdt.frontend.draft import PREDICTION
from vllm_osdt.frontend.infill import SUFFIX
from vllm_osdt.geometry import PROMPT
from vllm_osdt.messages import RESOLVED_KEY
from vllm_osdt.options import PREFIX

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

SENT = "osdt_sent"  # attribute of sampling parameters that come from an HTTP request
SUFFIX_FIELD = SUFFIX  # where the completion endpoint's suffix goes
DEFAULT_LIMIT_FIELD = "max_tokens_by_default"  # what vLLM no longer tells of a completion's limit
# What an endpoint calls fields of the chat request that it makes of its own, while it does.
FIELD_NAMES: ContextVar[Mapping[str, str]] = ContextVar("FIELD_NAMES", default=MappingProxyType({}))
PROMPT_NAMES = ("messages", "input", "token_ids", PROMPT)
MESSAGES_NAMES = {"response_format": "output_config.format", "thinking_token_budget": "thinking.budget_tokens"}


@dataclass(frozen=True)
class Sent:
    """What an HTTP client sent, where vLLM's sampling parameters do not tell.

    Attributes:
        max_tokens: Its limit on output tokens, before vLLM bounds it by the context; None for none.
        max_tokens_name: The field that holds it.
        options: Fields ``osdt_...`` and ``prediction`` at the top of the body, which vLLM drops.
        names: For a sampling parameter that vLLM makes of another field: that field's name.
        prompt_name: The field that holds the prompt.
        is_default_limit: Nobody sent ``max_tokens``: completions have 16 by default.
    """

    max_tokens: int | None
    max_tokens_name: str = "max_tokens"
    options: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    prompt_name: str = PROMPT
    is_default_limit: bool = False

    def name_of(self, parameter: str) -> str:
        """What the client calls a sampling parameter."""
        return self.names.get(parameter, parameter)


def name_of(params: "SamplingParams", parameter: str) -> str:
    """What the client calls a sampling parameter."""
    sent: Sent | None = getattr(params, SENT, None)
    return parameter if sent is None else sent.name_of(parameter)


def sent_by(request: Any) -> Sent:
    """What the client of one of vLLM's OpenAI endpoints sent.

    Args:
        request: Its ``ChatCompletionRequest``, ``CompletionRequest`` or ``ResponsesRequest``.
    """
    of_endpoint = FIELD_NAMES.get()
    names = {name: other for name, other in of_endpoint.items() if getattr(request, name, None) is not None}
    if getattr(request, "echo", False):
        names["prompt_logprobs"] = "echo"
    if getattr(request, "structured_outputs", None) is None:
        if getattr(request, "response_format", None) is not None:
            names["structured_outputs"] = of_endpoint.get("response_format", "response_format")
        elif getattr(getattr(request, "text", None), "format", None) is not None:
            names["structured_outputs"] = "text.format"
        elif getattr(request, "tools", None):
            names["structured_outputs"] = "tools"
    if getattr(request, "top_logprobs", None):
        names["logprobs"] = "top_logprobs"
    elif getattr(request, "include", None):
        names["logprobs"] = "include"
    limits = ("max_completion_tokens", "max_output_tokens", "max_tokens")
    name = next((name for name in limits if getattr(request, name, None) is not None), "max_tokens")
    limit = getattr(request, name, None)
    if limit == getattr(request, "max_tokens", None):  # the messages API becomes a chat request with both
        name = "max_tokens"
    names_of_ours = (request.model_extra or {}).items()
    own = {key: value for key, value in names_of_ours if key.startswith(PREFIX) or key == PREDICTION}
    prompt_name = next((one for one in PROMPT_NAMES if getattr(request, one, None) is not None), PROMPT)
    is_default_limit = bool((request.model_extra or {}).get(DEFAULT_LIMIT_FIELD))
    return Sent(limit, name, own, names, prompt_name, is_default_limit)


def merge_options(extra: dict[str, Any], top_level: dict[str, Any]) -> dict[str, Any]:
    """Options of ``extra_args`` and of the top of an HTTP body.

    Raises:
        InvalidOptionError: They contradict each other, or hold what the server sets.
    """
    if RESOLVED_KEY in extra or RESOLVED_KEY in top_level:
        raise InvalidOptionError(
            f"{RESOLVED_KEY} is set by the server; send the osdt_ options instead.",
            refusal="reserved",
            parameter=RESOLVED_KEY,
        )
    for name in extra.keys() & top_level.keys():
        if extra[name] != top_level[name]:
            raise InvalidOptionError(
                f"{name} is {shown(top_level[name])} at the top of the body and {shown(extra[name])} in vllm_xargs; "
                "send one of them.",
                refusal="two-places",
                parameter=name,
                value=top_level[name],
            )
    return {**extra, **top_level}
