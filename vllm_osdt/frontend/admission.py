"""What happens to a request before it enters the engine: refuse what cannot be honored, resolve its options.

Runs in the front-end process, so a refusal (ValueError offline, HTTP 400) never reaches the engine.
"""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vllm_osdt.calibration.store import ProfileStore, open_store
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.frontend.auto_task import AutoTasks
from vllm_osdt.frontend.draft import Draft, check_draft, read_draft
from vllm_osdt.frontend.infill import Encode, Reader, Template, check_company, check_region, template_canvas
from vllm_osdt.frontend.parameters import barred_policies, check_policy, check_sampling_params
from vllm_osdt.frontend.pins import Pins
from vllm_osdt.frontend.sent import SENT, Sent, merge_options
from vllm_osdt.frontend.switch import check_answer, read_switch
from vllm_osdt.geometry import PROMPT, Canvas, Limits
from vllm_osdt.messages import RequestSpec, Switch
from vllm_osdt.options import AUTO_TASK, PREFIX, DecodingOptions, ServerOptions, choosing
from vllm_osdt.options.canvas import canvas_limits, resolve_canvas
from vllm_osdt.options.family import validate_for_family
from vllm_osdt.options.operator import default_decoding_options, operator_values, server_options
from vllm_osdt.options.parsing import parse_options
from vllm_osdt.policies import POLICIES
from vllm_osdt.policies.adablock import LINE_END
from vllm_osdt.sampling import check_grammar, check_limits

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest


class FrontEnd:
    """What a front-end process knows of one engine's tasks and profiles."""

    REFRESH_S = 2.0  # how old the view of the profile folder may be

    def __init__(self, vllm_config: "VllmConfig") -> None:
        self._config = vllm_config
        self._tasks = AutoTasks(server_options(vllm_config).max_auto_tasks, self._has_profile)
        self._files: frozenset[str] = frozenset()
        self._looked_at = -math.inf

    @cached_property
    def _store(self) -> ProfileStore | None:
        return open_store(server_options(self._config).profile_dir, self._config)

    @cached_property
    def _pins(self) -> Pins:
        return Pins(self._store)

    @cached_property
    def _defaults(self) -> DecodingOptions:
        return default_decoding_options(self._config)

    @cached_property
    def _server_options(self) -> ServerOptions:
        return server_options(self._config)

    @cached_property
    def _operator_names(self) -> tuple[str, ...]:
        return tuple(operator_values(self._config))

    @cached_property
    def _limits(self) -> Limits:
        return canvas_limits(self._config, self._defaults.gen_length)

    @cached_property
    def _is_capped(self) -> bool:
        """Whether vLLM bounds every request's output by ``max_new_tokens``, which the checkpoint's alone does not."""
        model = self._config.model_config
        is_own = model.generation_config in ("auto", "vllm")
        return not is_own or model.override_generation_config.get("max_new_tokens") is not None

    def check(
        self,
        params: "SamplingParams",
        asked: "SamplingParams",
        prompt_length: int | None,
        adapter: str,
        encode: Encode | None = None,
    ) -> tuple[DecodingOptions, Canvas | None, Template | None, Draft | None, Switch | None]:
        """The options of a request, its canvas, what is pinned in it, its draft and its switch; changes nothing.

        Args:
            params: Its sampling parameters; vLLM may have bounded their ``max_tokens``.
            asked: The same as they came.
            prompt_length: Prompt tokens, None when that is not known yet: the canvas is then not looked at.
            adapter: Name of its adapter, "" for none.
            encode: Text to token ids; None without a tokenizer.

        Raises:
            InvalidOptionError: An option is unknown or out of range, the canvas does not fit, or the profile that it
                asks for cannot be used.
        """
        sent: Sent = getattr(asked, SENT, None) or Sent(asked.max_tokens)
        try:
            return self._check(params, asked, sent, prompt_length, adapter, encode)
        except InvalidOptionError as error:
            if error.parameter is not None:
                error.parameter = sent.prompt_name if error.parameter == PROMPT else sent.name_of(error.parameter)
            raise

    def _check(
        self,
        params: "SamplingParams",
        asked: "SamplingParams",
        sent: Sent,
        prompt_length: int | None,
        adapter: str,
        encode: Encode | None,
    ) -> tuple[DecodingOptions, Canvas | None, Template | None, Draft | None, Switch | None]:
        """See :meth:`check`; ``sent`` is what the client sent."""
        extra = merge_options(params.extra_args or {}, sent.options)
        traits = self._config.model_config.hf_config.traits
        vocabulary = self._config.model_config.get_vocab_size()
        reader = Reader(encode, vocabulary, traits.mask_token_id, self._limits.max_model_len)
        template = reader.read(
            extra, sent.max_tokens, ignores_ends=asked.ignore_eos, is_default_limit=sent.is_default_limit
        )
        draft = read_draft(extra, reader)
        base = replace(self._defaults, gen_length=None)
        if template is not None:  # what follows a hole must be seen
            base = replace(base, suffix_window=None)
        bans_ends = template is not None and not template.ends_itself
        check_limits(params, vocabulary, traits.mask_token_id, bans_ends=bans_ends, name_of=sent.name_of)
        options = validate_for_family(parse_options(extra, base=base, prefix=PREFIX), traits)
        POLICIES[options.policy].check_operator(options, self._server_options)
        options = with_delimiters(options, encode, vocabulary)
        check_grammar(params, options.edit_threshold, self._config.structured_outputs_config)
        if adapter and options.task not in (AUTO_TASK, None):  # another adapter is another model
            options = replace(options, task=f"{options.task}@{adapter}")
        if options.profile is not None:
            self._pins.check(options)
        check_draft(draft, extra, options, asked)
        check_policy(options, draft, params, asked, sent.name_of)
        if PREFIX + "prophet_region" in extra:
            check_region(template, options.prophet_region)
        if template is not None:
            check_company(template, options, asked, PREFIX + "gen_length" in extra, sent.name_of)
        switch = read_switch(options, reader, params, asked, template, draft, sent.name_of)
        if prompt_length is None:
            return options, None, template, draft, switch
        room = self._limits.max_model_len - prompt_length
        # What vLLM makes of a limit is the rest of the context, or less where the operator or the checkpoint say so.
        bounded = params.max_tokens is not None and params.max_tokens < room
        if sent.max_tokens is None and options.gen_length is not None:
            bounded = bounded and self._is_capped  # a canvas of the request's own: the checkpoint's length is not asked
        options, canvas = resolve_canvas(
            options,
            prompt_length=prompt_length,
            max_tokens=params.max_tokens if bounded else sent.max_tokens,
            limits=self._limits,
            max_tokens_name=sent.max_tokens_name,
            canvas=None if template is None else template_canvas(template, prompt_length, options, self._limits),
        )
        if switch is not None:
            check_answer(options, canvas, prompt_length, switch, self._server_options, sent.max_tokens_name)
        return options, canvas, template, draft, switch

    def follows_choice(self, params: "SamplingParams", asked: "SamplingParams") -> bool:
        """Whether a request leaves it to its task's profile how positions are chosen; arguments of :meth:`check`."""
        sent: Sent | None = getattr(asked, SENT, None)
        own = {**(params.extra_args or {}), **(sent.options if sent is not None else {})}
        return not (choosing(own, PREFIX) or choosing(self._operator_names))

    def name_task(self, options: DecodingOptions, token_ids: Sequence[int], adapter: str) -> DecodingOptions:
        """Find the task of a request that leaves it to us."""
        if options.task != AUTO_TASK or not options.calibrates:
            return options
        return replace(options, task=self._tasks.name(token_ids, adapter))

    def _has_profile(self, task: str) -> bool:
        if self._store is None:
            return False
        if time.monotonic() - self._looked_at > self.REFRESH_S:
            try:
                self._files = frozenset(os.listdir(self._store.folder))
            except OSError:
                self._files = frozenset()
            self._looked_at = time.monotonic()
        return self._store.path(task).name in self._files


def _keep_pages_apart(
    request: "EngineCoreRequest", block_length: int, answer_length: int | None, vllm_config: "VllmConfig"
) -> str | None:
    """A page's keys and values depend on the block length, which its hash does not hold.

    With blocks that pages cut, they also depend on tokens of the next page. Those of a model that commits causally
    depend on what is before them alone.

    Returns:
        The salt of the pages of an answer in blocks of ``answer_length``.
    """
    if vllm_config.model_config.hf_config.traits.commits_causally:
        return request.cache_salt
    if vllm_config.cache_config.block_size % block_length:
        assert request.sampling_params is not None
        request.sampling_params.skip_reading_prefix_cache = True
        request.cache_salt = f"osdt::{request.request_id}"
        return request.cache_salt
    own, default = request.cache_salt, vllm_config.model_config.hf_config.traits.block_length
    request.cache_salt = _salt_of(own, block_length, default)
    return _salt_of(own, answer_length or block_length, default)


def _salt_of(salt: str | None, block_length: int, default: int) -> str | None:
    """The client's salt, and the block length where it is not the server's."""
    if block_length == default and not (salt or "").startswith("osdt:"):
        return salt
    return f"osdt:{block_length}:{salt or ''}"  # so that no client's salt is that of another block length


_front_ends: dict[int, tuple["VllmConfig", FrontEnd]] = {}


def _front_end(vllm_config: "VllmConfig") -> FrontEnd:
    if id(vllm_config) not in _front_ends:
        _front_ends[id(vllm_config)] = vllm_config, FrontEnd(vllm_config)  # the config, so that its id stays its own
    return _front_ends[id(vllm_config)][1]


def check_early(
    params: "SamplingParams",
    prompt: Any,
    lora_request: "LoRARequest | None",
    vllm_config: "VllmConfig",
    encode: Encode | None = None,
    asked: "SamplingParams | None" = None,
) -> None:
    """What :func:`admit` would refuse, before an answer begins.

    Args:
        params: As the server made them, with what ends the output.
        prompt: vLLM's engine input, or a raw prompt, of which nothing is checked.
        lora_request: The request's adapter.
        vllm_config: The engine's configuration.
        encode: Text to token ids; None without a tokenizer.
        asked: The same before vLLM added anything; ``params`` when None.

    Raises:
        InvalidOptionError: See :func:`admit`.
    """
    token_ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) and "type" in prompt else None
    adapter = lora_request.lora_name if lora_request is not None else ""
    asked = params if asked is None else asked
    check_sampling_params(asked)
    _front_end(vllm_config).check(params, asked, None if token_ids is None else len(token_ids), adapter, encode)


def admit(
    request: "EngineCoreRequest",
    vllm_config: "VllmConfig",
    asked: "SamplingParams | None" = None,
    encode: Encode | None = None,
) -> None:
    """Resolve a request's options in place.

    Args:
        request: As ``InputProcessor.process_inputs`` made it; its sampling parameters are its own copy.
        vllm_config: The engine's configuration.
        asked: The sampling parameters as they came, before vLLM filled in what they leave open; the request's own when
            None.
        encode: Text to token ids; None without a tokenizer.

    Raises:
        InvalidOptionError: An option is unknown or out of range, the canvas does not fit, or there is no such profile.
    """
    params = request.sampling_params
    if params is None or request.prompt_token_ids is None:
        raise InvalidOptionError(
            "This diffusion model takes prompts of text or token ids and generates text, nothing else; send such a "
            "prompt to a completion or chat.",
            refusal="no-token-prompt",
            parameter=PROMPT,
        )
    if request.resumable:
        raise InvalidOptionError(
            "A streaming input session is not implemented for this diffusion model; send the whole prompt at once.",
            refusal="streaming-input",
            parameter=PROMPT,
        )
    front_end, token_ids = _front_end(vllm_config), request.prompt_token_ids
    adapter = request.lora_request.lora_name if request.lora_request is not None else ""
    asked = params if asked is None else asked
    options, canvas, template, draft, switch = front_end.check(params, asked, len(token_ids), adapter, encode)
    options = front_end.name_task(options, token_ids, adapter)
    if vllm_config.cache_config.enable_prefix_caching:
        salt = _keep_pages_apart(request, options.block_length, options.answer_block_length, vllm_config)
        switch = None if switch is None else switch._replace(cache_salt=salt)
    assert canvas is not None
    params.max_tokens = canvas.max_output_end - len(token_ids)
    if template is not None and not template.ends_itself:
        # End tokens are banned but in open holes, and end no more than these.
        params.min_tokens, params.stop_token_ids, params._eos_token_id = params.max_tokens, [], None
    follows = front_end.follows_choice(params, asked)
    spec = RequestSpec(
        options,
        canvas,
        follows_choice=follows,
        barred=barred_policies(options, draft, params, asked) if follows else (),
        pinned=None if template is None else template.tokens,
        draft=draft.tokens[: params.max_tokens] if draft and draft.tokens else None,
        switch=switch,
    )
    params.extra_args = spec.as_extra_args()


def with_delimiters(options: DecodingOptions, encode: Encode | None, vocabulary: int) -> DecodingOptions:
    """The options with the delimiters of ``adablock``, where that is on.

    Raises:
        InvalidOptionError: None is given and the tokenizer's line end is no single token, or one is no token id.
    """
    if not options.adablock:
        return options
    ids = options.adablock_delimiters
    if ids is None:
        found = [] if encode is None else encode(LINE_END)
        if len(found) != 1:
            raise InvalidOptionError(
                f"adablock is true, and this model's line end is {len(found)} tokens instead of one; send "
                "adablock_delimiters.",
                refusal="adablock-line-end",
                parameter="adablock_delimiters",
            )
        return replace(options, adablock_delimiters=list(found))
    for one in ids:
        if one >= vocabulary:
            raise InvalidOptionError(
                f"adablock_delimiters has {one}; this model's token ids are below {vocabulary}: send one of them.",
                refusal="adablock-vocabulary",
                parameter="adablock_delimiters",
                value=one,
            )
    return options
