"""Patches of vLLM's HTTP server, whose classes are imported where an engine of ours starts behind it."""

from types import ModuleType
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger

from vllm_osdt.host.compat.front_end import FrontEnd
from vllm_osdt.host.compat.refusing import http_400, refuse_early
from vllm_osdt.host.compat.wrapping import wrap
from vllm_osdt.messages import KEY
from vllm_osdt.models.registry import is_canvas_model
from vllm_osdt.options import PREFIX

logger = init_logger(f"vllm.{__name__}")


def patch_server(front_end: FrontEnd) -> None:
    """The classes of vLLM's server that :func:`~vllm_osdt.host.compat.requests.patch_early_refusals` changes."""
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

    sent = front_end.sent

    def make_to_sampling_params(original):
        def to_sampling_params(self, *args, **kwargs):
            params = original(self, *args, **kwargs)
            setattr(params, sent.SENT, sent.sent_by(self))
            if getattr(self, "echo", False) and not self.logprobs and self.prompt_logprobs is None:
                params.prompt_logprobs = None  # a chat that is echoed has 0 of them, though none was asked for
            return params

        return to_sampling_params

    for request in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        wrap(request, "to_sampling_params", make_to_sampling_params)

    def make_render_completion(original):
        # vLLM asks the model's renderer to put a suffix into the prompt; a canvas has a place for it.
        async def render_completion(self, request, *args, **kwargs):
            if is_canvas_model(self.model_config) and request.suffix is not None:
                setattr(request, sent.SUFFIX_FIELD, request.suffix)
                request.suffix = None
            return await original(self, request, *args, **kwargs)

        return render_completion

    wrap(OnlineRenderer, "render_completion", make_render_completion)

    def make_generate(original):
        # The responses API calls the engine when its answer is first read.
        def _generate_with_builtin_tools(self, request_id, engine_input, sampling_params, *args, **kwargs):
            if is_canvas_model(self.model_config):
                lora_request = kwargs.get("lora_request")
                refuse_early(
                    front_end.admission.check_early, self.engine_client, engine_input, sampling_params, lora_request
                )
            return original(self, request_id, engine_input, sampling_params, *args, **kwargs)

        return _generate_with_builtin_tools

    wrap(OpenAIServingResponses, "_generate_with_builtin_tools", make_generate)

    async def own_fields(raw_request):
        """Fields of ours at the top of a body whose class drops what it does not know."""
        body = await raw_request.json() if raw_request is not None else {}
        return {name: value for name, value in body.items() if name.startswith(PREFIX)}

    def make_create_completion(original):
        # vLLM writes its default of 16 into the body before it checks the body.
        async def create_completion(self, request, raw_request=None):
            default = type(request).model_fields["max_tokens"].default
            if is_canvas_model(self.model_config) and raw_request is not None and request.max_tokens == default:
                is_absent = (await raw_request.json()).get("max_tokens") is None
                setattr(request, sent.DEFAULT_LIMIT_FIELD, is_absent)
            return await original(self, request, raw_request)

        return create_completion

    wrap(OpenAIServingCompletion, "create_completion", make_create_completion)

    def make_serve_tokens(original):
        async def serve_tokens(self, request, raw_request=None):
            if is_canvas_model(self.model_config):
                params, own = request.sampling_params, await own_fields(raw_request)
                with http_400():
                    params.extra_args = sent.merge_options(params.extra_args or {}, own)
                is_limited = request.is_sampling_param_provided("max_tokens")
                limit = params.max_tokens if is_limited else None
                setattr(params, sent.SENT, sent.Sent(limit, prompt_name="token_ids"))
            return await original(self, request, raw_request)

        return serve_tokens

    wrap(ServingTokens, "serve_tokens", make_serve_tokens)

    def make_create_messages(original):
        # Its requests drop fields that they do not know, and its router logs a traceback of what is raised.
        async def create_messages(self, request, raw_request=None):
            if not is_canvas_model(self.model_config):
                return await original(self, request, raw_request)
            own = await own_fields(raw_request)
            token = sent.FIELD_NAMES.set(sent.MESSAGES_NAMES)
            try:
                with http_400():
                    request.vllm_xargs = sent.merge_options(request.vllm_xargs or {}, own) or None
                return await original(self, request, raw_request)
            except VLLMValidationError as error:
                return self.create_error_response(error)
            finally:
                sent.FIELD_NAMES.reset(token)

        return create_messages

    wrap(AnthropicServingMessages, "create_messages", make_create_messages)

    def make_refusal(what, parameter=None):
        def make(original):
            def refused(self, *args, **kwargs):
                if is_canvas_model(self.model_config):
                    logger.info("Refused a request: %s", what)
                    with http_400():
                        front_end.parameters.refuse(what, parameter)
                return original(self, *args, **kwargs)

            return refused

        return make

    wrap(BeamSearchOnlineMixin, "beam_search", make_refusal("use_beam_search", "use_beam_search"))
    wrap(ServingGenerativeScoring, "create_generative_scoring", make_refusal("Generative scoring"))
    wrap(ServingStructuredDecisions, "create_decision", make_refusal("A structured decision"))


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

    wrap(OpenAIServingCompletion, "request_output_to_completion_response", make_completion_response)
    wrap(OpenAIServingCompletion, "completion_stream_generator", make_completion_stream)
    wrap(OpenAIServingChat, "chat_completion_full_generator", make_full)
    wrap(OpenAIServingChat, "chat_completion_stream_generator", make_stream)
    wrap(OpenAIServingChatBatch, "chat_completion_full_generator_batch", make_full)
    wrap(ServingTokens, "serve_tokens_full_generator", make_full)
    wrap(ServingTokens, "serve_tokens_stream_generator", make_stream)

    def make_append_output(original):
        # The responses API hands its answer's maker the context, not the outputs; after tool calls, the last turn's.
        def append_output(self, output):
            told: dict[int, Any] = {}
            response.note(output.outputs, told)
            setattr(self, KEY, told)
            original(self, output)

        return append_output

    for context in (SimpleContext, ParsableContext):
        wrap(context, "append_output", make_append_output)

    def make_responses(original):
        async def responses_full_generator(self, request, sampling_params, result_generator, context, *args, **kwargs):
            answer = await original(self, request, sampling_params, result_generator, context, *args, **kwargs)
            if isinstance(answer, ErrorResponse):
                return answer
            return response.tell(answer, getattr(context, KEY, {}), 1)

        return responses_full_generator

    wrap(OpenAIServingResponses, "responses_full_generator", make_responses)

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

    wrap(AnthropicServingMessages, "messages_full_converter", make_messages)
    if "chat_completion_stream_generator" in AnthropicServingMessages.__dict__:
        wrap(AnthropicServingMessages, "chat_completion_stream_generator", make_event_stream)
    else:
        wrap(AnthropicServingMessages, "message_stream_converter", make_message_stream)


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

    wrap(OpenAIServingChat, "_make_parser", make)
    wrap(OpenAIServingResponses, "_make_response_parser", make)
