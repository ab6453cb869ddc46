"""Serve masked diffusion language models with vLLM and One-Shot Dynamic Thresholding (arXiv 2511.02077).

Importing this package loads neither torch nor vLLM; vLLM finds the plugin through the entry point
``vllm.general_plugins: osdt``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

__version__ = "0.1.0"


def register() -> None:
    """Register the plugin with vLLM (see :func:`vllm_osdt.plugin.register`)."""
    from vllm_osdt.plugin import register as register_plugin

    register_plugin()


def sampling_params(**values: Any) -> "SamplingParams":
    """Sampling parameters for ``LLM.generate`` that are greedy unless told, as these models are decoded.

    vLLM's own ``SamplingParams()`` samples at temperature 1.0 and ends after 16 tokens; here temperature is 0.0, and
    without ``max_tokens`` the answer has the model's usual length.

    Args:
        values: Fields of vLLM's ``SamplingParams``, and decoding options by their names (``task="quiz"``) and
            ``infill``, ``suffix`` and ``draft``, which go to ``extra_args`` with the prefix ``osdt_``.

    Raises:
        InvalidOptionError: A name is neither.
    """
    from vllm import SamplingParams

    from vllm_osdt.declaration import meant_or_known
    from vllm_osdt.errors import InvalidOptionError
    from vllm_osdt.options import FORMER_NAMES, OPTION_NAMES, PREFIX, REQUEST_FIELDS

    fields = SamplingParams.__struct_fields__
    for name in values:
        if name not in (*fields, *OPTION_NAMES, *FORMER_NAMES, *REQUEST_FIELDS):
            close = meant_or_known(name, (*OPTION_NAMES, *REQUEST_FIELDS, *fields))
            raise InvalidOptionError(
                f"{name!r} is neither a sampling parameter of vLLM nor a decoding option{close}; `vllm-osdt options` "
                "explains the options.",
                refusal="neither-parameter-nor-option",
                parameter=name,
                value=values[name],
            )
    own_names = (*OPTION_NAMES, *FORMER_NAMES, *REQUEST_FIELDS)
    own = {PREFIX + name: values.pop(name) for name in own_names if name in values}
    extra_args = {**(values.pop("extra_args", None) or {}), **own}
    return SamplingParams(**{"temperature": 0.0, "max_tokens": None, **values}, extra_args=extra_args or None)


def describe(completion: Any) -> dict[str, Any] | None:
    """How a request was decoded.

    Args:
        completion: One of ``RequestOutput.outputs``, of ``LLM.generate`` or ``AsyncLLM``.

    Returns:
        ``policy``, ``task`` (the one it was found to belong to), ``profile`` (id of the calibration profile it used, or
        None), ``calibrating`` (whether it was recorded for one), ``nfe`` (forward passes it took part in),
        ``tokens_per_forward``, ``weights_version`` (number of weight updates before its last tokens were decided, or
        the caller's label of the weights) and ``weights_version_at_start`` (the same for its first tokens). ``trace``
        where the request asked for it, ``error`` where its own parameters left it no token. None for other models.
    """
    return getattr(completion.spec_decode_metrics, "osdt", None)


def profiles(llm: "LLM") -> list[dict[str, Any]]:
    """The calibration profiles that an offline engine holds.

    Args:
        llm: An engine that serves one of this package's models.

    Returns:
        One dict per profile: ``id``, ``created``, ``task``, ``block_length``, ``cache``, ``threshold``,
        ``num_requests``, ``choice`` (how requests that leave it open are decoded, None for the policy ``osdt``),
        ``mean_confidence`` (by block and denoising step, None where nothing was recorded) and
        ``thresholds`` (T by block and step, for each ``granularity/statistic/record`` that a request has asked for;
        None where the static threshold holds).
    """
    client = llm.llm_engine.engine_core
    if hasattr(client, "call_utility"):
        return client.call_utility("calibration_profiles")
    return client.engine_core.calibration_profiles()  # the engine runs in this process
