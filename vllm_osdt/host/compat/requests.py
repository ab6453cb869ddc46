"""Patches of what vLLM does with a request before its engine has it."""

from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

from vllm_osdt.host.compat.front_end import FrontEnd
from vllm_osdt.host.compat.refusing import encoder, http_400, refuse_early, refusing_failed
from vllm_osdt.host.compat.server import patch_answers, patch_parsers, patch_server
from vllm_osdt.host.compat.wrapping import wrap
from vllm_osdt.models.registry import is_canvas_model

logger = init_logger(f"vllm.{__name__}")


def patch_sampling_validation(check_sampling_params: Callable[[Any], None]) -> None:
    """vLLM answers 400 for a diffusion model when temperature != 1 or a seed is set; ours honor both.

    Goes when vLLM lets a model declare the sampling parameters it supports.
    """
    from vllm.sampling_params import SamplingParams

    def make(original):
        def _validate_diffusion(self, model_config):
            if is_canvas_model(model_config):
                with http_400():
                    check_sampling_params(self)
            else:
                original(self, model_config)

        return _validate_diffusion

    wrap(SamplingParams, "_validate_diffusion", make)


def patch_structured_output_validation() -> None:
    """vLLM answers 400 for structured output of a diffusion model; ours have it. All other checks are vLLM's.

    Goes when vLLM lets a model declare the sampling parameters it supports.
    """
    from vllm.sampling_params import SamplingParams

    class Autoregressive:
        """A model's config, but for one property."""

        is_diffusion = False

        def __init__(self, model_config):
            self._model_config = model_config

        def __getattr__(self, name):
            return getattr(self._model_config, name)

    def make(original):
        def _validate_structured_outputs(self, model_config, *args, **kwargs):
            own = is_canvas_model(model_config)
            original(self, Autoregressive(model_config) if own else model_config, *args, **kwargs)

        return _validate_structured_outputs

    wrap(SamplingParams, "_validate_structured_outputs", make)


def patch_admission(admit: Callable[..., None]) -> None:
    """Options are checked where prompt and parameters meet, in the front end, for LLM.generate and the server alike.

    Goes when vLLM's ``validate_request`` hook is open to models (today it belongs to the platform).
    """
    from vllm.v1.engine.input_processor import InputProcessor

    def make(original):
        def process_inputs(self, request_id, prompt, params, *args, **kwargs):
            request = original(self, request_id, prompt, params, *args, **kwargs)
            if is_canvas_model(self.model_config):
                with http_400():
                    admit(request, self.vllm_config, params, encoder(self.tokenizer))
            return request

        return process_inputs

    wrap(InputProcessor, "process_inputs", make)


def patch_early_refusals(front_end: FrontEnd) -> None:
    """A server checks a request before it begins to answer, and knows what the client sent.

    vLLM admits a request when its answer is first read, which for a stream is after HTTP 200 has been sent; and what
    it makes of a body no longer tells an absent ``max_tokens``, ``response_format`` or a field of ours at the top. The
    server's classes, those of its answers included (:func:`patch_answers`), are patched when an engine of ours starts
    in its process: other processes need not import them.
    Goes when ``validate_request`` (see :func:`patch_admission`) is open to models and called before an answer begins.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    def make_init(original):
        def __init__(self, vllm_config, *args, **kwargs):
            if is_canvas_model(vllm_config.model_config):
                try:
                    patch_server(front_end)
                except (ImportError, KeyError) as error:  # serving goes on, as before these patches
                    logger.warning("Requests are checked when their answer is first read: %r", error)
                try:
                    patch_answers(front_end.response)
                except (ImportError, KeyError) as error:
                    logger.warning("Answers of some endpoints do not say how they were decoded: %r", error)
                try:
                    patch_parsers(front_end.parsing)
                except (ImportError, KeyError) as error:
                    logger.warning("Parsers of reasoning and tool calls get a block at a time in streams: %r", error)
            original(self, vllm_config, *args, **kwargs)

        return __init__

    def make_generate(original):
        def generate(self, prompt, sampling_params, *args, **kwargs):
            if is_canvas_model(self.model_config):
                refuse_early(front_end.admission.check_early, self, prompt, sampling_params, kwargs.get("lora_request"))
                parameter = front_end.sent.name_of(sampling_params, "structured_outputs")
                return refusing_failed(original(self, prompt, sampling_params, *args, **kwargs), parameter)
            return original(self, prompt, sampling_params, *args, **kwargs)

        return generate

    wrap(AsyncLLM, "__init__", make_init)
    wrap(AsyncLLM, "generate", make_generate)


def patch_beam_search(refuse: Callable[[str], None]) -> None:
    """``LLM.beam_search`` would be refused for parameters that the caller never sent.

    Goes as :func:`patch_early_refusals`.
    """
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin

    def make(original):
        def beam_search(self, *args, **kwargs):
            if is_canvas_model(self.model_config):
                refuse("Beam search")
            return original(self, *args, **kwargs)

        return beam_search

    wrap(BeamSearchOfflineMixin, "beam_search", make)
