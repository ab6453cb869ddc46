"""Drafts: a guess at the answer that comes with a request, from another model, an earlier answer, or a retrieval.

A drafted token is taken where the model itself proposes it, with a lower confidence than tokens need otherwise
(``csrc_triton.draft``). So a draft is read as it is: one that is longer than the answer is cut, and the model writes
what a shorter one leaves.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_osdt.errors import InvalidOptionError, shown
from vllm_osdt.frontend.infill import Reader

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

    from vllm_osdt.options import DecodingOptions

DRAFT = "osdt_draft"
PREDICTION = "prediction"  # OpenAI's name in chat completions
THRESHOLD, NGRAM = "osdt_draft_threshold", "osdt_draft_ngram"


class Draft(NamedTuple):
    """Drafted tokens of an answer, from its beginning, and the field that brings them."""

    tokens: list[int]
    name: str


def read_draft(extra: dict[str, Any], reader: Reader) -> Draft | None:
    """Take the draft out of a request's ``extra_args``; it may be empty, None without one.

    Args:
        extra: Changed in place.
        reader: Of texts and token ids.

    Raises:
        InvalidOptionError: It is neither text nor token ids of the model, or comes by two names.
    """
    value, predicted = extra.pop(DRAFT, None), extra.pop(PREDICTION, None)
    if value is not None and predicted is not None:
        raise InvalidOptionError(
            f"{DRAFT} and {PREDICTION} are both sent; send one of them.", refusal="draft-names", parameter=DRAFT
        )
    if predicted is not None:
        return Draft(reader.ids_of(_content(predicted)) or [], PREDICTION)
    if value is None:
        return None
    tokens = reader.ids_of(value)
    if tokens is None:
        raise InvalidOptionError(
            f"{DRAFT} is {shown(value)}; expected text or a list of token ids below {reader.vocabulary}.",
            refusal="draft-value",
            parameter=DRAFT,
        )
    return Draft(tokens, DRAFT)


def _content(predicted: Any) -> str:
    """The text of OpenAI's ``prediction``: a string, or parts of text.

    Raises:
        InvalidOptionError: It is something else.
    """
    content = predicted.get("content") if isinstance(predicted, dict) and predicted.get("type") == "content" else None
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise InvalidOptionError(
            f'{PREDICTION} is {shown(predicted)}; expected {{"type": "content", "content": text}}.',
            refusal="draft-value",
            parameter=PREDICTION,
        )
    return content


def check_draft(
    draft: Draft | None, extra: dict[str, Any], options: "DecodingOptions", asked: "SamplingParams"
) -> None:
    """Refuse what a draft cannot be combined with, and what means nothing without one.

    Args:
        draft: Of the request.
        extra: Its other fields.
        options: Of the request.
        asked: Its sampling parameters, as they came.

    Raises:
        InvalidOptionError: Names the parameter.
    """
    own_ngram = extra.get(NGRAM) is not None
    if asked.structured_outputs is not None and (draft is not None or own_ngram):
        name = NGRAM if draft is None else draft.name
        raise InvalidOptionError(
            f"{name} cannot be sent with structured output: a grammar allows a token once all before it are decided, "
            "and a draft has tokens decided in any order. Leave one of them out.",
            refusal="draft-grammar",
            parameter=name,
        )
    if THRESHOLD in extra and draft is None and options.draft_ngram is None:
        raise InvalidOptionError(
            f"{THRESHOLD} is {shown(extra[THRESHOLD])}, but the request has no draft; send {DRAFT} or {NGRAM}, or "
            "leave it out.",
            refusal="draft-without",
            parameter=THRESHOLD,
        )
