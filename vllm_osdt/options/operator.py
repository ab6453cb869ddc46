"""What the operator set: ``--osdt-config``, and the same of an engine's configuration."""

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.geometry import BLOCK_CACHE, CAUSAL_CACHE
from vllm_osdt.models.traits import Traits
from vllm_osdt.options import SERVER_OPTION_NAMES, DecodingOptions, ServerOptions
from vllm_osdt.options.family import validate_for_family
from vllm_osdt.options.parsing import check_operator_values, parse_options, parse_server_options

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def parse_operator_json(text: str) -> dict[str, Any]:
    """The value of ``--osdt-config``, for argparse.

    Names and values are checked before anything is loaded; what the model's family allows is checked when that is
    known.

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


def operator_values(vllm_config: "VllmConfig") -> dict[str, Any]:
    """The operator's own values, unchecked."""
    additional = vllm_config.additional_config
    return dict(additional.get("osdt", {})) if isinstance(additional, dict) else {}


def default_decoding_options(vllm_config: "VllmConfig") -> DecodingOptions:
    """The options of a request that sets none: ours, the checkpoint's block length, then the operator's.

    Raises:
        InvalidOptionError: ``additional_config["osdt"]`` has an unknown name or a bad value.
    """
    traits: Traits = vllm_config.model_config.hf_config.traits
    base = DecodingOptions(block_length=traits.block_length)
    if traits.is_block_causal:
        base = replace(base, cache_mode=CAUSAL_CACHE if traits.commits_causally else BLOCK_CACHE)
    values = operator_values(vllm_config)
    values = {name: values[name] for name in values if name not in SERVER_OPTION_NAMES}
    return validate_for_family(parse_options(values, base=base), traits)


def server_options(vllm_config: "VllmConfig") -> ServerOptions:
    """What the operator alone decides.

    Raises:
        InvalidOptionError: A bad value.
    """
    values = operator_values(vllm_config)
    return parse_server_options({name: values[name] for name in values if name in SERVER_OPTION_NAMES})
