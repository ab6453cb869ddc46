"""The only place that patches vLLM. Each entry says what it changes, why no hook serves, and when it goes.

Every patch leaves other models alone: it looks at the model first and otherwise calls the original.
"""

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from copy import copy
from types import MappingProxyType, ModuleType
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.utils.math_utils import round_up

from vllm_osdt.errors import InvalidOptionError, OSDTError
from vllm_osdt.messages import ERROR, KEY, TRACE, join_traces
from vllm_osdt.models.registry import is_canvas_model
from vllm_osdt.options import OPTION_NAMES, PREFIX, operator_help, parse_operator_json

logger = init_logger("vllm.vllm_osdt.host.compat")

# Engine arguments as the operator gave them, while vLLM makes its config of them: vLLM fills in its own defaults before
# it asks for ours. Empty for a config that was made without them.
ASKED: ContextVar[Mapping[str, Any]] = ContextVar("ASKED", default=MappingProxyType({}))
ASKED_NAMES = ("dtype", "enable_chunked_prefill", "enable_prefix_caching", "async_scheduling", "diffusion_config")

_MARK = "_vllm_osdt_patched"
TRACE_SO_FAR = "osdt_trace"  # attribute of vLLM's state of a request in the front end


def _wrap(owner: Any, name: str, make: Any) -> None:
    """Replace attribute ``name`` of ``owner`` by ``make(original)``, once."""
    original = owner.__dict__[name]
    function = original.__func__ if isinstance(original, staticmethod) else original
    target: Any = function.fget if isinstance(function, property) else function
    if getattr(target, _MARK, False):
        return
    wrapper = functools.wraps(target)(make(target))
    setattr(wrapper, _MARK, True)
    if isinstance(original, property):
        setattr(owner, name, property(wrapper))
    elif isinstance(original, staticmethod):
        setattr(owner, name, staticmethod(wrapper))
    else:
        setattr(owner, name, wrapper)


class RefusedRequestError(VLLMValidationError, ValueError):
    """A refusal as vLLM's own kind, which its server answers with HTTP 400; the message has parameter and value."""

    def __init__(self, message: str, *, parameter: str | None = None, value: Any = None) -> None:
        VLLMValidationError.__init__(self, message, parameter=parameter, value=value)

    def __str__(self) -> str:
        return ValueError.__str__(self)


@contextmanager
def _http_400() -> Iterator[None]:
    """Our refusals leave as a ValueError that is also vLLM's own kind, an option by the name that a request has."""
    try:
        yield
    except InvalidOptionError as error:
        parameter = PREFIX + error.parameter if error.parameter in OPTION_NAMES else error.parameter
        raise RefusedRequestError(str(error), parameter=parameter, value=error.value) from error
    except OSDTError as error:
        raise RefusedRequestError(str(error)) from error


def patch_sampling_validation(check_sampling_params: Callable[[Any], None]) -> None:
    """vLLM answers 400 for a diffusion model when temperature != 1 or a seed is set; ours honor both.

    Goes when vLLM lets a model declare the sampling parameters it supports.
    """
    from vllm.sampling_params import SamplingParams

    def make(original):
        def _validate_diffusion(self, model_config):
            if is_canvas_model(model_config):
                with _http_400():
                    check_sampling_params(self)
            else:
                original(self, model_config)

        return _validate_diffusion

    _wrap(SamplingParams, "_validate_diffusion", make)


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

    _wrap(SamplingParams, "_validate_structured_outputs", make)


def patch_admission(admit: Callable[..., None]) -> None:
    """Options are checked where prompt and parameters meet, in the front end, for LLM.generate and the server alike.

    Goes when vLLM's ``validate_request`` hook is open to models (today it belongs to the platform).
    """
    from vllm.v1.engine.input_processor import InputProcessor

    def make(original):
        def process_inputs(self, request_id, prompt, params, *args, **kwargs):
            request = original(self, request_id, prompt, params, *args, **kwargs)
            if is_canvas_model(self.model_config):
                with _http_400():
                    admit(request, self.vllm_config, params, _encoder(self.tokenizer))
            return request

        return process_inputs

    _wrap(InputProcessor, "process_inputs", make)


def patch_early_refusals(admission: ModuleType, response: ModuleType, parsing: ModuleType) -> None:
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
                    patch_server(admission)
                except (ImportError, KeyError) as error:  # serving goes on, as before these patches
                    logger.warning("Requests are checked when their answer is first read: %r", error)
                try:
                    patch_answers(response)
                except (ImportError, KeyError) as error:
                    logger.warning("Answers of some endpoints do not say how they were decoded: %r", error)
                try:
                    patch_parsers(parsing)
                except (ImportError, KeyError) as error:
                    logger.warning("Parsers of reasoning and tool calls get a block at a time in streams: %r", error)
            original(self, vllm_config, *args, **kwargs)

        return __init__

    def make_generate(original):
        def generate(self, prompt, sampling_params, *args, **kwargs):
            if is_canvas_model(self.model_config):
                _check_early(admission.check_early, self, prompt, sampling_params, kwargs.get("lora_request"))
                parameter = admission.name_of(sampling_params, "structured_outputs")
                return _refusing_failed(original(self, prompt, sampling_params, *args, **kwargs), parameter)
            return original(self, prompt, sampling_params, *args, **kwargs)

        return generate

    _wrap(AsyncLLM, "__init__", make_init)
    _wrap(AsyncLLM, "generate", make_generate)


def _encoder(tokenizer: Any) -> Callable[[str], list[int]] | None:
    """Text to token ids, as the text stands there."""
    return None if tokenizer is None else functools.partial(tokenizer.encode, add_special_tokens=False)


def _check_early(check_early: Any, engine: Any, prompt: Any, params: Any, lora_request: Any) -> None:
    """Refuse a request now, with one line in the log; vLLM's own checks of its parameters follow ours."""
    try:
        if params.bad_words and engine.renderer.tokenizer is not None:
            params = copy(params)
            params.update_from_tokenizer(engine.renderer.tokenizer)
        with _http_400():
            check_early(
                _with_ends(engine, params),
                prompt,
                lora_request,
                engine.vllm_config,
                _encoder(engine.renderer.tokenizer),
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


async def _refusing_failed(results: Any, parameter: str) -> Any:
    """The results of a request; one that its own parameters left no token for its grammar is refused like others."""
    async with aclosing(results):
        async for result in results:
            for output in result.outputs:
                reason = (getattr(output, KEY) or {}).get(ERROR)
                if reason is not None:
                    logger.info("Refused a request: %s", reason)
                    raise RefusedRequestError(reason, parameter=parameter)
            yield result


def patch_server(admission: ModuleType) -> None:
    """The classes of vLLM's server that :func:`patch_early_refusals` changes."""
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.entrypoints.generate.generative_scoring.serving import ServingGenerativeScoring
    from vllm.entrypoints.generate.structured_decisions.serving import ServingStructuredDecisions
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
    from vllm.renderers.online_renderer import OnlineRenderer

    def make_to_sampling_params(original):
        def to_sampling_params(self, *args, **kwargs):
            params = original(self, *args, **kwargs)
            setattr(params, admission.SENT, admission.sent_by(self))
            if getattr(self, "echo", False) and not self.logprobs and self.prompt_logprobs is None:
                params.prompt_logprobs = None  # a chat that is echoed has 0 of them, though none was asked for
            return params

        return to_sampling_params

    for request in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        _wrap(request, "to_sampling_params", make_to_sampling_params)

    def make_render_completion(original):
        # vLLM asks the model's renderer to put a suffix into the prompt; a canvas has a place for it.
        async def render_completion(self, request, *args, **kwargs):
            if is_canvas_model(self.model_config) and request.suffix is not None:
                setattr(request, admission.SUFFIX_FIELD, request.suffix)
                request.suffix = None
            return await original(self, request, *args, **kwargs)

        return render_completion

    _wrap(OnlineRenderer, "render_completion", make_render_completion)

    def make_generate(original):
        # The responses API calls the engine when its answer is first read.
        def _generate_with_builtin_tools(self, request_id, engine_input, sampling_params, *args, **kwargs):
            if is_canvas_model(self.model_config):
                lora_request = kwargs.get("lora_request")
                _check_early(admission.check_early, self.engine_client, engine_input, sampling_params, lora_request)
            return original(self, request_id, engine_input, sampling_params, *args, **kwargs)

        return _generate_with_builtin_tools

    _wrap(OpenAIServingResponses, "_generate_with_builtin_tools", make_generate)

    async def own_fields(raw_request):
        """Fields of ours at the top of a body whose class drops what it does not know."""
        body = await raw_request.json() if raw_request is not None else {}
        return {name: value for name, value in body.items() if name.startswith(admission.PREFIX)}

    def make_create_completion(original):
        # vLLM writes its default of 16 into the body before it checks the body.
        async def create_completion(self, request, raw_request=None):
            default = type(request).model_fields["max_tokens"].default
            if is_canvas_model(self.model_config) and raw_request is not None and request.max_tokens == default:
                is_absent = (await raw_request.json()).get("max_tokens") is None
                setattr(request, admission.DEFAULT_LIMIT_FIELD, is_absent)
            return await original(self, request, raw_request)

        return create_completion

    _wrap(OpenAIServingCompletion, "create_completion", make_create_completion)

    def make_serve_tokens(original):
        async def serve_tokens(self, request, raw_request=None):
            if is_canvas_model(self.model_config):
                params, own = request.sampling_params, await own_fields(raw_request)
                with _http_400():
                    params.extra_args = admission.merge_options(params.extra_args or {}, own)
                is_limited = request.is_sampling_param_provided("max_tokens")
                limit = params.max_tokens if is_limited else None
                setattr(params, admission.SENT, admission.Sent(limit, prompt_name="token_ids"))
            return await original(self, request, raw_request)

        return serve_tokens

    _wrap(ServingTokens, "serve_tokens", make_serve_tokens)

    def make_create_messages(original):
        # Its requests drop fields that they do not know, and its router logs a traceback of what is raised.
        async def create_messages(self, request, raw_request=None):
            if not is_canvas_model(self.model_config):
                return await original(self, request, raw_request)
            own = await own_fields(raw_request)
            token = admission.FIELD_NAMES.set(admission.MESSAGES_NAMES)
            try:
                with _http_400():
                    request.vllm_xargs = admission.merge_options(request.vllm_xargs or {}, own) or None
                return await original(self, request, raw_request)
            except VLLMValidationError as error:
                return self.create_error_response(error)
            finally:
                admission.FIELD_NAMES.reset(token)

        return create_messages

    _wrap(AnthropicServingMessages, "create_messages", make_create_messages)

    def make_refusal(what, parameter=None):
        def make(original):
            def refused(self, *args, **kwargs):
                if is_canvas_model(self.model_config):
                    logger.info("Refused a request: %s", what)
                    with _http_400():
                        admission.refuse(what, parameter)
                return original(self, *args, **kwargs)

            return refused

        return make

    _wrap(BeamSearchOnlineMixin, "beam_search", make_refusal("use_beam_search", "use_beam_search"))
    _wrap(ServingGenerativeScoring, "create_generative_scoring", make_refusal("Generative scoring"))
    _wrap(ServingStructuredDecisions, "create_decision", make_refusal("A structured decision"))


def patch_answers(response: ModuleType) -> None:
    """Every endpoint's answer has the key ``osdt``, which says how its request was decoded.

    Where an endpoint makes its answer, it has the engine's outputs, but no field and no hook for what they say. Goes
    when vLLM's answers carry what a plugin says of a request.

    Args:
        response: ``frontend.response``, which finds the place in an answer.
    """
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.responses.context import ParsableContext, SimpleContext
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    def num_choices(request):
        return getattr(request, "sampling_params", request).n or 1

    def make_completion_response(original):
        def request_output_to_completion_response(self, final_res_batch, request, *args, **kwargs):
            answer = original(self, final_res_batch, request, *args, **kwargs)
            told: dict[int, Any] = {}
            n = num_choices(request)
            for index, output in enumerate(final_res_batch):
                response.note(output.outputs, told, index * n)
            return response.tell(answer, told, len(final_res_batch) * n)

        return request_output_to_completion_response

    def make_completion_stream(original):
        def completion_stream_generator(self, request, engine_inputs, result_generator, *args, **kwargs):
            if not is_canvas_model(self.model_config):
                return original(self, request, engine_inputs, result_generator, *args, **kwargs)
            told: dict[int, Any] = {}
            n = num_choices(request)
            results = response.noting(result_generator, told, lambda result: result[0] * n)
            pieces = original(self, request, engine_inputs, results, *args, **kwargs)
            return response.in_stream(pieces, told, len(engine_inputs) * n)

        return completion_stream_generator

    def make_full(original):
        async def full_generator(self, request, results, *args, **kwargs):
            if not is_canvas_model(self.model_config):
                return await original(self, request, results, *args, **kwargs)
            told: dict[int, Any] = {}
            if isinstance(results, list):  # of a batch of chats, a choice each
                noted = [response.noting(one, told, lambda _, index=index: index) for index, one in enumerate(results)]
                n = len(results)
            else:
                noted, n = response.noting(results, told), num_choices(request)
            answer = await original(self, request, noted, *args, **kwargs)
            return answer if isinstance(answer, ErrorResponse) else response.tell(answer, told, n)

        return full_generator

    def make_stream(original):
        def stream_generator(self, request, result_generator, *args, **kwargs):
            if not is_canvas_model(self.model_config):
                return original(self, request, result_generator, *args, **kwargs)
            told: dict[int, Any] = {}
            pieces = original(self, request, response.noting(result_generator, told), *args, **kwargs)
            return response.in_stream(pieces, told, num_choices(request))

        return stream_generator

    _wrap(OpenAIServingCompletion, "request_output_to_completion_response", make_completion_response)
    _wrap(OpenAIServingCompletion, "completion_stream_generator", make_completion_stream)
    _wrap(OpenAIServingChat, "chat_completion_full_generator", make_full)
    _wrap(OpenAIServingChat, "chat_completion_stream_generator", make_stream)
    _wrap(OpenAIServingChatBatch, "chat_completion_full_generator_batch", make_full)
    _wrap(ServingTokens, "serve_tokens_full_generator", make_full)
    _wrap(ServingTokens, "serve_tokens_stream_generator", make_stream)

    def make_append_output(original):
        # The responses API hands its answer's maker the context, not the outputs; after tool calls, the last turn's.
        def append_output(self, output):
            told: dict[int, Any] = {}
            response.note(output.outputs, told)
            setattr(self, KEY, told)
            original(self, output)

        return append_output

    for context in (SimpleContext, ParsableContext):
        _wrap(context, "append_output", make_append_output)

    def make_responses(original):
        async def responses_full_generator(self, request, sampling_params, result_generator, context, *args, **kwargs):
            answer = await original(self, request, sampling_params, result_generator, context, *args, **kwargs)
            if isinstance(answer, ErrorResponse):
                return answer
            return response.tell(answer, getattr(context, KEY, {}), 1)

        return responses_full_generator

    _wrap(OpenAIServingResponses, "responses_full_generator", make_responses)

    def make_messages(original):
        def messages_full_converter(self, generator):
            about = getattr(generator, KEY, None)
            return response.tell(original(self, generator), {} if about is None else {0: about}, 1)

        return messages_full_converter

    def make_message_stream(original):  # vLLM 0.32 makes its events of the chunks of a chat
        def message_stream_converter(self, generator):
            told: dict[int, Any] = {}
            return response.in_events(original(self, response.sniffing(generator, told)), told)

        return message_stream_converter

    def make_event_stream(original):  # vLLM 0.33 makes them of the engine's outputs
        def chat_completion_stream_generator(self, request, result_generator, *args, **kwargs):
            told: dict[int, Any] = {}
            results = response.noting(result_generator, told)
            return response.in_events(original(self, request, results, *args, **kwargs), told)

        return chat_completion_stream_generator

    _wrap(AnthropicServingMessages, "messages_full_converter", make_messages)
    if "chat_completion_stream_generator" in AnthropicServingMessages.__dict__:
        _wrap(AnthropicServingMessages, "chat_completion_stream_generator", make_event_stream)
    else:
        _wrap(AnthropicServingMessages, "message_stream_converter", make_message_stream)


def patch_parsers(parsing: ModuleType) -> None:
    """Parsers of reasoning and of tool calls get a stream's tokens one at a time.

    A chunk of ours has a block of them, and some parsers lose or leave markers in such a chunk. Goes when vLLM's
    parsers say the same of a chunk as of its tokens.

    Args:
        parsing: ``frontend.parsing``, which hands out the tokens.
    """
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    def make(original):
        def make_parser(self, request, tokenizer, *args, **kwargs):
            parser = original(self, request, tokenizer, *args, **kwargs)
            if parser is None or not is_canvas_model(self.model_config):
                return parser
            return parsing.reading_token_by_token(parser, tokenizer)

        return make_parser

    _wrap(OpenAIServingChat, "_make_parser", make)
    _wrap(OpenAIServingResponses, "_make_response_parser", make)


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

    _wrap(BeamSearchOfflineMixin, "beam_search", make)


def patch_response_field() -> None:
    """A completion says how it was decoded: ``CompletionOutput.osdt``, which is None for other models.

    The engine's message has no field for it, so it travels in that of KV connectors. Here it is moved to vLLM's
    per-request figures, which reach the finished completion however its pieces are merged. Its plain values are also
    told among them (``metrics.speculative_decoding.osdt``), which goes with the next release. The rest goes when
    vLLM's per-request metrics carry a plugin's values.
    """
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.output_processor import RequestState
    from vllm.v1.metrics.stats import RequestSpecDecodeMetrics

    def make_request_output(original):
        def make_request_output(self, new_token_ids, pooling_output, finish_reason, stop_reason, *args, **kwargs):
            params, rest = (args[0], args[1:]) if args else (kwargs.pop("kv_transfer_params", None), ())
            if params is not None and KEY in params:
                about = params[KEY]
                if TRACE in about:  # the engine sends that of new tokens
                    before = getattr(self, TRACE_SO_FAR, None)
                    about[TRACE] = about[TRACE] if before is None else join_traces(before, about[TRACE])
                    setattr(self, TRACE_SO_FAR, about[TRACE])
                setattr(self.spec_decode_metrics, KEY, about)
                params = None
            return original(self, new_token_ids, pooling_output, finish_reason, stop_reason, params, *rest, **kwargs)

        return make_request_output

    def make_to_dict(original):
        def to_dict(self):
            found = getattr(self, KEY, None)
            if found is None:
                return original(self)
            plain = {name: value for name, value in found.items() if not isinstance(value, list | dict)}
            return {**original(self), KEY: plain}

        return to_dict

    _wrap(RequestState, "make_request_output", make_request_output)
    _wrap(RequestSpecDecodeMetrics, "to_dict", make_to_dict)
    setattr(CompletionOutput, KEY, property(lambda self: getattr(self.spec_decode_metrics, KEY, None)))


def patch_metrics(prometheus_metrics: Callable[..., Any]) -> None:
    """Our Prometheus metrics, made and fed by vLLM's own logger as those of a KV connector are.

    vLLM's hook for other loggers (``vllm.stat_logger_plugins``) is told nothing that the engine's stats lack, and
    ``LLM`` does not load it. Goes when engine stats carry a plugin's values.
    """
    from prometheus_client import Counter, Gauge, Histogram
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging, KVConnectorProm

    def make_init(original):
        def __init__(self, vllm_config, labelnames, per_engine_labelvalues):
            original(self, vllm_config, labelnames, per_engine_labelvalues)
            if is_canvas_model(vllm_config.model_config):
                types = {Gauge: self._gauge_cls, Counter: self._counter_cls, Histogram: self._histogram_cls}
                self.prom_metrics = prometheus_metrics(vllm_config, types, labelnames, per_engine_labelvalues)

        return __init__

    def make_observe(original):
        def observe(self, transfer_stats_data):
            if KEY not in transfer_stats_data:
                original(self, transfer_stats_data)

        return observe

    _wrap(KVConnectorProm, "__init__", make_init)
    _wrap(KVConnectorLogging, "observe", make_observe)


def patch_command_line() -> None:
    """``--plugin osdt`` and ``--osdt-config`` for ``vllm serve`` and every other command with engine arguments.

    Goes when vLLM has a plugin hook for engine arguments.
    """
    from vllm.engine.arg_utils import EngineArgs

    def make_add_cli_args(original):
        def add_cli_args(parser, *args, **kwargs):
            parser = original(parser, *args, **kwargs)
            if "--osdt-config" not in parser._option_string_actions:
                group = parser.add_argument_group(
                    title="vllm-osdt",
                    description="Masked diffusion language models with One-Shot Dynamic Thresholding.",
                )
                group.add_argument(
                    "--plugin",
                    choices=["osdt"],
                    default=None,
                    help="Fail unless this plugin is loaded; vLLM loads installed plugins by itself.",
                )
                group.add_argument(
                    "--osdt-config",
                    type=parse_operator_json,
                    default=None,
                    help=operator_help().replace("%", "%%"),
                )
            return parser

        return add_cli_args

    def make_from_cli_args(original):
        def from_cli_args(cls, args):
            options = getattr(args, "osdt_config", None)
            if options is not None:  # in the arguments: API servers of their own read them before they load plugins
                args.additional_config = {**(args.additional_config or {}), "osdt": options}
            return original(cls, args)

        return from_cli_args

    # AsyncEngineArgs.add_cli_args loads the plugins and then calls this one.
    _wrap(EngineArgs, "add_cli_args", make_add_cli_args)
    original = EngineArgs.__dict__["from_cli_args"].__func__
    if not getattr(original, _MARK, False):
        wrapper = functools.wraps(original)(make_from_cli_args(original))
        setattr(wrapper, _MARK, True)
        EngineArgs.from_cli_args = classmethod(wrapper)


def patch_engine_arguments() -> None:
    """Our hook for engine settings sees which of them the operator has set.

    Its refusals are not wrapped in a validation error of the whole config.

    vLLM replaces arguments that are None by its own defaults before it asks for ours. Goes when a model can state its
    defaults.
    """
    from pydantic import ValidationError
    from vllm.engine.arg_utils import EngineArgs

    def make_create(original):
        def create_engine_config(self, *args, **kwargs):
            # Once: vLLM writes what it fills in into the arguments.
            asked = self.__dict__.setdefault("osdt_asked", {name: getattr(self, name) for name in ASKED_NAMES})
            token = ASKED.set(asked)
            try:
                return original(self, *args, **kwargs)
            except ValidationError as error:
                for one in error.errors():
                    cause = one.get("ctx", {}).get("error")
                    if isinstance(cause, OSDTError):
                        raise cause from None
                raise
            finally:
                ASKED.reset(token)

        return create_engine_config

    _wrap(EngineArgs, "create_engine_config", make_create)


def patch_runner_choice() -> None:
    """Without a GPU, our Triton stand-in must not move other models to Model Runner V2, whose kernels it interprets.

    Goes when vLLM for CPU ships a Triton compiler.
    """
    from vllm.config import VllmConfig

    from vllm_osdt.host.cpu.triton_backend.interpreter import is_interpreting

    def make(original):
        def use_v2_model_runner(self):
            import vllm.envs as envs

            if is_interpreting() and envs.VLLM_USE_V2_MODEL_RUNNER is None and not is_canvas_model(self.model_config):
                return False
            return original(self)

        return use_v2_model_runner

    _wrap(VllmConfig, "use_v2_model_runner", make)


def patch_top_k_top_p() -> None:
    """vLLM's top-k and top-p of other models use a Triton kernel that the interpreter cannot run.

    On a CPU without a Triton compiler they take vLLM's PyTorch path, as they would without us.

    Goes when vLLM for CPU ships a Triton compiler.
    """
    from vllm_osdt.host.cpu.triton_backend.interpreter import is_interpreting

    if is_interpreting():
        from vllm.v1.sample.ops import topk_topp_sampler

        topk_topp_sampler.HAS_TRITON = False


def patch_cpu_lora() -> None:
    """vLLM's CPU kernels give rows without an adapter none.

    They read the adapter index -1 of such rows as the last slot, and so give them the adapter that is there. Called by
    our CPU worker, when adapters are enabled.

    Goes when vLLM's own kernels pass such rows over.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    def make(original):
        def on_rows_with_an_adapter(inputs, weights, output, indices, *args, **kwargs):
            chosen = indices >= 0
            if chosen.all():
                return original(inputs, weights, output, indices, *args, **kwargs)
            rows = output[chosen]
            original(inputs[chosen], weights, rows, indices[chosen], *args, **kwargs)
            output[chosen] = rows

        return on_rows_with_an_adapter

    for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"):
        _wrap(lora_ops, name, make)
        setattr(punica_cpu, name, getattr(lora_ops, name))


def patch_host_kernels() -> None:
    """Host functions of Model Runner V2 whose kernels the interpreter would run are replaced by NumPy functions.

    Called by our CPU worker, so processes that serve other models keep vLLM's functions. Goes when vLLM for CPU ships
    a Triton compiler.
    """
    from vllm_osdt.host.cpu.triton_backend.interpreter import is_interpreting

    if not is_interpreting():
        return
    from vllm_osdt.host.cpu.numpy_kernels import REPLACEMENTS

    for replacement in REPLACEMENTS:
        owner = importlib.import_module(replacement.module)
        *path, name = replacement.attribute.split(".")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, name, replacement.function)


def patch_page_allocation(kv_cache_manager: Any, allocate: Callable[..., Any]) -> Callable[..., Any]:
    """The scheduler's request for KV pages goes to ``allocate``, which asks for those of the planned rows.

    Returns vLLM's own function.

    vLLM asks with the rows of the prompt, before it knows those of the canvas. Goes when the scheduler lets a subclass
    say how many tokens a waiting request starts with.
    """
    original = kv_cache_manager.allocate_slots
    kv_cache_manager.allocate_slots = allocate
    return original


def patch_scheduler_metadata(builder: Any, num_queries: int) -> None:
    """FlashAttention 3's metadata builder has room for the queries of a block-causal step.

    With CUDA graphs it keeps a buffer of four numbers for each of ``max_num_seqs`` requests, or of the rows of the
    largest graph; to attention every block of a step's rows is a request. Other builders have no such buffer. Goes when
    the builder takes its size from ``max_num_batched_tokens``.

    Args:
        builder: vLLM's, of one KV group.
        num_queries: That a step has at most.
    """
    buffer = getattr(builder, "scheduler_metadata", None)
    num_numbers = 1 + round_up(num_queries, 4) * 4  # as vLLM's builder computes it
    if buffer is not None and buffer.numel() < num_numbers:
        builder.scheduler_metadata = buffer.new_zeros(num_numbers)


def patch_page_caching(kv_cache_manager: Any, num_final: Callable[[Any], int]) -> None:
    """A request's pages enter the prefix cache up to ``num_final`` of it, whoever asks.

    vLLM 0.33 asks for all rows of a step that has output, drafts that it takes for accepted included. Goes when the
    scheduler lets a subclass say how many tokens are final.
    """
    original = kv_cache_manager.cache_blocks

    def cache_blocks(request: Any, num_computed_tokens: int) -> None:
        original(request, min(num_computed_tokens, num_final(request)))

    kv_cache_manager.cache_blocks = cache_blocks


def patch_config_parser() -> None:
    """An architecture of ours gets its config class whatever its model type (see ``CanvasConfigParser``).

    vLLM lets a plugin register parsers of other formats, and config classes by model type alone. Goes when config
    classes can be registered by architecture.
    """
    from vllm.transformers_utils.config import _CONFIG_FORMAT_TO_CONFIG_PARSER

    from vllm_osdt.models.configs.parser import CanvasConfigParser

    _CONFIG_FORMAT_TO_CONFIG_PARSER["hf"] = CanvasConfigParser


def patch_engine_core() -> None:
    """An engine core answers ``calibration_profiles``, and its scheduler hears of other weights.

    A caller's RPC may change the workers' weights in many ways, and vLLM leaves it to him to reset the prefix cache.
    His label for weights goes no further than vLLM's own outputs. Goes when a scheduler can register utility calls, and
    is told of weight updates.
    """
    from vllm.v1.engine.core import EngineCore

    def calibration_profiles(self) -> list[dict[str, Any]]:
        """The calibration profiles of this engine; none for other models."""
        calibrator = getattr(self.scheduler, "calibrator", None)
        return [] if calibrator is None else calibrator.profiles()

    def hear_weights(core) -> Any:
        """The scheduler of a canvas model, which now knows its workers' weights; None for other models."""
        if not is_canvas_model(core.vllm_config.model_config):
            return None
        core.scheduler.hear_weights(core.model_executor.collective_rpc("held_weights")[0])
        return core.scheduler

    def make_collective_rpc(original):
        def collective_rpc(self, *args, **kwargs):
            results = original(self, *args, **kwargs)
            hear_weights(self)
            return results

        return collective_rpc

    def make_set_weight_version(original):
        def set_weight_version(self, weight_version):
            scheduler = hear_weights(self)
            original(self, weight_version)
            if scheduler is not None:
                scheduler.name_weights(weight_version)

        return set_weight_version

    EngineCore.calibration_profiles = calibration_profiles
    _wrap(EngineCore, "collective_rpc", make_collective_rpc)
    _wrap(EngineCore, "set_weight_version", make_set_weight_version)


def apply(
    admission: ModuleType, response: ModuleType, parsing: ModuleType, prometheus_metrics: Callable[..., Any]
) -> None:
    """Apply every patch; safe to call twice.

    Args:
        admission: ``frontend.admission``, which the patches of the front end call.
        response: ``frontend.response``, likewise.
        parsing: ``frontend.parsing``, likewise.
        prometheus_metrics: Class of the metrics that the front end exports.
    """
    patch_sampling_validation(admission.check_sampling_params)
    patch_structured_output_validation()
    patch_admission(admission.admit)
    patch_early_refusals(admission, response, parsing)
    patch_beam_search(admission.refuse)
    patch_response_field()
    patch_metrics(prometheus_metrics)
    patch_command_line()
    patch_engine_arguments()
    patch_engine_core()
    patch_config_parser()
    patch_runner_choice()
    patch_top_k_top_p()
