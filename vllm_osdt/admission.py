"""What happens to a request before it enters the engine: refuse what cannot be honoured, resolve its options.

Runs in the front-end process, so a refusal (ValueError offline, HTTP 400) never reaches the engine.
"""

import math
import os
import time
from collections import OrderedDict
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from vllm_osdt.calibration.auto_task import AutoTasks
from vllm_osdt.calibration.profile import ProfileKey
from vllm_osdt.calibration.store import ProfileStore
from vllm_osdt.config import (
    AUTO_TASK,
    NEUTRAL_SAMPLING,
    PREFIX,
    RESOLVED_KEY,
    DecodingOptions,
    parse_options,
    resolve_canvas,
)
from vllm_osdt.engine_config import check_family, open_store, server_defaults, server_options
from vllm_osdt.errors import InvalidOptionError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

MAX_PINS = 1024  # pinned profiles whose keys are remembered


def check_sampling_params(params: "SamplingParams") -> None:
    """Refuse sampling parameters that would be ignored.

    Raises:
        InvalidOptionError: Names every such parameter with its value and the one to send instead.
    """
    refused = []
    for name, neutral in NEUTRAL_SAMPLING.items():
        value = getattr(params, name, neutral[0])
        if value not in neutral:
            refused.append(f"{name}={value!r} (send {neutral[0]!r} or leave it out)")
    if refused:
        raise InvalidOptionError(
            f"Not implemented for this diffusion model: {'; '.join(refused)}. Supported: temperature, seed, stop, "
            "stop_token_ids, max_tokens, n, ignore_eos and the osdt_ options."
        )


class FrontEnd:
    """What a front-end process knows of one engine's tasks and profiles."""

    REFRESH_S = 2.0  # how old the view of the profile folder may be

    def __init__(self, vllm_config: "VllmConfig") -> None:
        self._config = vllm_config
        self._tasks = AutoTasks(server_options(vllm_config).max_auto_tasks, self._has_profile)
        self._files: frozenset[str] = frozenset()
        self._looked_at = -math.inf
        self._pins: OrderedDict[tuple[str, str], ProfileKey] = OrderedDict()

    @cached_property
    def _store(self) -> ProfileStore | None:
        return open_store(self._config)

    def resolve(self, options: DecodingOptions, request: "EngineCoreRequest") -> DecodingOptions:
        """Name the task and check the profile that a request asks for.

        Raises:
            InvalidOptionError: The profile cannot be used.
        """
        adapter = request.lora_request.lora_name if request.lora_request is not None else ""
        if adapter and options.task != AUTO_TASK:  # another adapter is another model
            options = replace(options, task=f"{options.task}@{adapter}")
        if options.profile is not None:
            self._check_pin(options)
        if options.task != AUTO_TASK or options.policy != "osdt":
            return options
        assert request.prompt_token_ids is not None
        return replace(options, task=self._tasks.name(request.prompt_token_ids, adapter))

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

    def _check_pin(self, options: DecodingOptions) -> None:
        if options.policy != "osdt":
            raise InvalidOptionError(
                f"profile is {options.profile!r}, but policy {options.policy!r} uses none; leave it out."
            )
        if options.recalibrate or options.task == AUTO_TASK:
            what = "recalibrate" if options.recalibrate else f"task {AUTO_TASK!r}"
            raise InvalidOptionError(
                f"profile is {options.profile!r}, which {what} contradicts; name the profile's own task and leave "
                "recalibrate out."
            )
        if self._store is None:
            raise InvalidOptionError(
                f"profile is {options.profile!r}, but this server keeps profiles in memory only; start it with a "
                "profile_dir."
            )
        assert options.profile is not None
        pin = (options.task, options.profile)
        if pin not in self._pins:
            found = self._store.load_id(*pin)
            if found is None:
                raise InvalidOptionError(
                    f"profile is {options.profile!r}, but task {options.task!r} of this model has no such profile in "
                    f"{self._store.folder}. `vllm-osdt profiles list` shows them; `profiles import` brings one back."
                )
            self._pins[pin] = found.key
            if len(self._pins) > MAX_PINS:
                self._pins.popitem(last=False)
        key = self._pins[pin]
        # Of sub-blocks and editing the key's cache mode tells too.
        asked = {"block_length": options.block_length, "cache": options.cache_key, "threshold": options.threshold}
        for name, value in asked.items():
            made_with = getattr(key, name)
            if made_with != value:
                remedy = f"send osdt_{name} = {made_with!r}"
                if ":" in f"{made_with}{value}":
                    remedy = "send the sub_block_length, sub_block_cache and edit_threshold that it was made with"
                raise InvalidOptionError(
                    f"profile {options.profile!r} was made with {name} {made_with!r}, but the request has {value!r}; "
                    f"{remedy}."
                )


def _keep_pages_apart(request: "EngineCoreRequest", block_length: int, vllm_config: "VllmConfig") -> None:
    """A page's keys and values depend on the block length, which its hash does not hold; with blocks that pages cut,
    they also depend on tokens of the next page."""
    if vllm_config.cache_config.block_size % block_length:
        assert request.sampling_params is not None
        request.sampling_params.skip_reading_prefix_cache = True
        request.cache_salt = f"osdt::{request.request_id}"
        return
    salt = request.cache_salt or ""
    is_default = block_length == vllm_config.model_config.hf_config.block_length
    if not is_default or salt.startswith("osdt:"):  # so that no client's salt is that of another block length
        request.cache_salt = f"osdt:{block_length}:{salt}"


_front_ends: dict[int, tuple["VllmConfig", FrontEnd]] = {}


def _front_end(vllm_config: "VllmConfig") -> FrontEnd:
    if id(vllm_config) not in _front_ends:
        _front_ends[id(vllm_config)] = vllm_config, FrontEnd(vllm_config)  # the config, so that its id stays its own
    return _front_ends[id(vllm_config)][1]


def admit(request: "EngineCoreRequest", vllm_config: "VllmConfig") -> None:
    """Resolve a request's options in place.

    Args:
        request: As ``InputProcessor.process_inputs`` made it; its sampling parameters are its own copy.
        vllm_config: The engine's configuration.

    Raises:
        InvalidOptionError: An option is unknown or out of range, the canvas does not fit, or there is no such profile.
    """
    params = request.sampling_params
    if params is None or request.prompt_token_ids is None:
        raise InvalidOptionError("This diffusion model takes token prompts and generates text, nothing else.")
    if request.resumable:
        raise InvalidOptionError("Streaming input sessions are not implemented for this diffusion model.")
    extra = dict(params.extra_args or {})
    resolved = extra.pop(RESOLVED_KEY, None)
    if resolved is not None:
        raise InvalidOptionError(f"{RESOLVED_KEY} is set by the server; send the osdt_ options instead.")
    scheduler_config = vllm_config.scheduler_config
    max_model_len = vllm_config.model_config.max_model_len
    prompt_length = len(request.prompt_token_ids)
    # vLLM fills in the rest of the context for a request that names no limit.
    is_open_ended = params.max_tokens is None or params.max_tokens == max_model_len - prompt_length
    options, max_tokens = resolve_canvas(
        check_family(
            parse_options(extra, base=server_defaults(vllm_config), prefix=PREFIX), vllm_config.model_config.hf_config
        ),
        prompt_length=prompt_length,
        max_tokens=None if is_open_ended else params.max_tokens,
        max_model_len=max_model_len,
        max_num_batched_tokens=min(
            scheduler_config.max_num_batched_tokens,
            scheduler_config.max_num_scheduled_tokens or scheduler_config.max_num_batched_tokens,
        ),
    )
    options = _front_end(vllm_config).resolve(options, request)
    if vllm_config.cache_config.enable_prefix_caching:
        _keep_pages_apart(request, options.block_length, vllm_config)
    params.max_tokens = max_tokens
    params.extra_args = {RESOLVED_KEY: options.as_dict()}
