"""Engine settings of the model families, set so that users need no flag."""

import math
import os
import platform
import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CompilationMode, CUDAGraphMode, DiffusionConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_osdt.calibration.fingerprint import ModelFingerprint, hash_weights
from vllm_osdt.calibration.store import ProfileStore, default_folder
from vllm_osdt.config import (
    BLOCK_CACHE,
    MAX_BLOCK_LENGTH,
    NEUTRAL_SAMPLING,
    SERVER_OPTION_NAMES,
    DecodingOptions,
    Limits,
    ServerOptions,
    parse_options,
    parse_server_options,
)
from vllm_osdt.errors import InvalidOptionError, OSDTError

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import AttentionConfig, ModelConfig, VllmConfig

logger = init_logger("vllm.vllm_osdt.engine_config")

# Engine arguments as the operator gave them, while vLLM makes its config of them (see ``compat``): vLLM fills in its
# own defaults before it asks for ours. Empty for a config that was made without them.
ASKED: ContextVar[Mapping[str, Any]] = ContextVar("ASKED", default=MappingProxyType({}))
ASKED_NAMES = ("dtype", "enable_chunked_prefill", "enable_prefix_caching", "async_scheduling", "diffusion_config")

# Tokens of the smallest KV page that attention runs well with; small pages share more of two prompts.
SMALLEST_PAGE = {"cpu": 32, "gpu": 16}
BACKENDS_WITH_BUFFERS = ("FLASHINFER", "FLEX_ATTENTION")
UNQUANTISED_CACHE = ("auto", "bfloat16", "float16", "float32")
SCHEDULER_CLS = "vllm_osdt.scheduler.CanvasScheduler"


def is_ours(model_config) -> bool:
    """Whether an engine's model is one of this package's."""
    from vllm_osdt.plugin import ARCHITECTURES

    return model_config is not None and model_config.architecture in ARCHITECTURES


def _operator_values(vllm_config: "VllmConfig") -> dict[str, Any]:
    additional = vllm_config.additional_config
    return dict(additional.get("osdt", {})) if isinstance(additional, dict) else {}


def server_defaults(vllm_config: "VllmConfig") -> DecodingOptions:
    """The options of a request that sets none: ours, the checkpoint's block length, then the operator's.

    Raises:
        InvalidOptionError: ``additional_config["osdt"]`` has an unknown name or a bad value.
    """
    hf_config = vllm_config.model_config.hf_config
    base = DecodingOptions(block_length=hf_config.block_length)
    if getattr(hf_config, "is_block_causal", False):
        base = replace(base, cache=BLOCK_CACHE)
    values = _operator_values(vllm_config)
    values = {name: values[name] for name in values if name not in SERVER_OPTION_NAMES}
    return check_family(parse_options(values, base=base), hf_config)


def check_family(options: DecodingOptions, hf_config: "PretrainedConfig") -> DecodingOptions:
    """Refuse what only other model families have; fill in this one's sub-blocks.

    Raises:
        InvalidOptionError: A canvas length, token editing or sub-blocks on a model without, or sub-blocks that do not
            fit a block.
    """
    if options.gen_length is not None and options.cache == BLOCK_CACHE:
        raise InvalidOptionError(
            f"gen_length is {options.gen_length}, but no block of this model sees a later one, so a longer canvas "
            "changes nothing. Leave it out and send max_tokens."
        )
    if options.edit_threshold is not None and not getattr(hf_config, "can_edit", False):
        raise InvalidOptionError(
            f"edit_threshold is {options.edit_threshold:g}, but this model was not trained to replace tokens that it "
            "has written; leave it out."
        )
    if options.policy == "entropy_bound" and options.edit_threshold is not None:
        raise InvalidOptionError(
            f"edit_threshold is {options.edit_threshold:g}, a confidence, but policy 'entropy_bound' looks at "
            "entropies; leave it out or choose another policy."
        )
    own = getattr(hf_config, "sub_block_length", None)
    steps = options.steps or options.steps_per_block
    if own is not None and options.policy == "static_threshold" and steps is not None:
        raise InvalidOptionError(
            f"steps is {steps}; with policy 'static_threshold' this model's sub-blocks take as many steps as they "
            "need. Leave it out, or choose policy 'fixed_steps'."
        )
    if own is None:
        if options.sub_block_length is not None or options.sub_block_cache:
            raise InvalidOptionError(
                f"sub_block_length is {options.sub_block_length}, sub_block_cache {options.sub_block_cache}; this "
                "model's blocks have no sub-blocks. Leave both out."
            )
        return options
    sub_block = own if options.sub_block_length is None else options.sub_block_length
    if options.block_length % sub_block:
        raise InvalidOptionError(
            f"sub_block_length is {sub_block}; it must divide block_length {options.block_length}. Send another one."
        )
    return replace(options, sub_block_length=sub_block)


def canvas_limits(vllm_config: "VllmConfig", defaults: DecodingOptions) -> Limits:
    """What bounds the canvases of an engine.

    Args:
        vllm_config: The engine's configuration.
        defaults: The operator's options.
    """
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    checkpoint = model.get_diff_sampling_param().get("max_tokens")  # max_new_tokens, the operator's or the checkpoint's
    return Limits(
        max_model_len=model.max_model_len,
        max_num_batched_tokens=min(
            scheduler.max_num_batched_tokens, scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
        ),
        gen_length=defaults.gen_length,
        open_ended=checkpoint,
    )


def _check_gen_length(vllm_config: "VllmConfig", defaults: DecodingOptions) -> None:
    """The operator's canvas length must be one that a request can have; it comes before the checkpoint's.

    Raises:
        OSDTError: It is no whole number of blocks, or longer than the engine's limits.
    """
    if defaults.gen_length is None:
        return
    limits = canvas_limits(vllm_config, defaults)
    longest = min(limits.max_model_len, limits.max_num_batched_tokens) - 1
    if defaults.gen_length % defaults.block_length or defaults.gen_length > longest:
        raise OSDTError(
            f"gen_length is {defaults.gen_length}; it must be a multiple of block_length {defaults.block_length}, and "
            f"at most {longest}: with a prompt it must fit max_model_len {limits.max_model_len} and "
            f"max_num_batched_tokens {limits.max_num_batched_tokens}."
        )
    # What the checkpoint says to requests without a limit; None is left out by vLLM.
    vllm_config.model_config.override_generation_config.setdefault("max_new_tokens", None)


def server_options(vllm_config: "VllmConfig") -> ServerOptions:
    """What the operator alone decides.

    Raises:
        InvalidOptionError: A bad value.
    """
    values = _operator_values(vllm_config)
    return parse_server_options({name: values[name] for name in values if name in SERVER_OPTION_NAMES})


def _weights_folder(model: str, revision: str | None) -> Path | None:
    """The folder of a checkpoint: itself, or that of its snapshot in the Hugging Face cache; None if there is none."""
    from vllm.transformers_utils.repo_utils import try_get_local_file

    if Path(model).is_dir():
        return Path(model)
    config = try_get_local_file(model, "config.json", revision or "main")
    return config.parent if isinstance(config, Path) else None


def model_fingerprint(vllm_config: "VllmConfig") -> ModelFingerprint:
    """The identity of an engine's model, for calibration profiles."""
    model = vllm_config.model_config
    weights = None
    if vllm_config.load_config.load_format != "dummy":
        folder = _weights_folder(model.model, model.revision)
        weights = hash_weights(folder) if folder is not None else None
    if weights is None:  # no files of a known kind here
        commit = getattr(model.hf_config, "_commit_hash", None)
        weights = f"{model.model}@{commit or model.revision}"
    return ModelFingerprint(
        weights=weights,
        quantization=model.quantization or "none",
        dtype=str(model.dtype).removeprefix("torch."),
        vocab_size=model.hf_config.vocab_size,
        mask_token_id=model.hf_config.mask_token_id,
    )


def model_name(model: str) -> str:
    """What people call a model: its repository, or its folder. (Offline, vLLM puts the folder of a snapshot in the
    place of the repository.)"""
    snapshot = re.search(r"models--([^/]+)/snapshots/[^/]+/?$", model)
    if snapshot:
        return snapshot[1].replace("--", "/")
    return Path(model).resolve().name if Path(model).is_dir() else model


def open_store(vllm_config: "VllmConfig") -> ProfileStore | None:
    """Where an engine's profiles outlive it; None when they do not."""
    folder = server_options(vllm_config).profile_dir
    if folder is None:
        folder = str(default_folder())
    if not folder:
        return None
    name = model_name(vllm_config.model_config.model)
    return ProfileStore(Path(folder).expanduser(), model_fingerprint(vllm_config), name)


def _refuse_if_asked(name: str, value: bool, reason: str) -> None:
    """Refuse an engine argument that the operator has set and these models cannot honor.

    Raises:
        OSDTError: The operator has set it to that value.
    """
    if ASKED.get().get(name) is value:
        raise OSDTError(f"{name} is {value}, but {reason}; leave it out.")


def _set_up_full_attention(vllm_config: "VllmConfig", options: ServerOptions) -> list[str]:
    """Settings of models whose positions see the whole canvas; returns what was switched off."""
    switched_off = []
    if not options.fused_commit:
        raise OSDTError(
            "fused_commit is false, but this model's finished blocks have no keys and values of their own to write; "
            "leave it out."
        )
    reason = "this model's refresh computes prompt and canvas together"
    _refuse_if_asked("enable_chunked_prefill", True, reason)
    if vllm_config.scheduler_config.enable_chunked_prefill:
        vllm_config.scheduler_config.enable_chunked_prefill = False
        switched_off.append("chunked prefill (a refresh computes prompt and canvas together)")
    longest = vllm_config.scheduler_config.long_prefill_token_threshold
    if longest:
        raise OSDTError(f"long_prefill_token_threshold is {longest}, but {reason}; leave it out.")
    _refuse_if_asked("enable_prefix_caching", True, "keys and values of this model's prompts depend on their canvas")
    if vllm_config.cache_config.enable_prefix_caching:
        vllm_config.cache_config.enable_prefix_caching = False
        switched_off.append("prefix caching (a prompt's keys and values depend on its canvas)")
    return switched_off


def _set_up_block_causal(vllm_config: "VllmConfig", block_length: int, options: ServerOptions) -> list[str]:
    """Settings of block-causal models; returns what was switched off.

    Keys and values of a block depend on all of its tokens, so pages may be shared only where each is a whole number of
    blocks.
    """
    cache, scheduler, model = vllm_config.cache_config, vllm_config.scheduler_config, vllm_config.model_config
    for name in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
        max_rows = getattr(scheduler, name)
        if max_rows is not None and max_rows < 2 * block_length:
            raise OSDTError(
                f"{name} is {max_rows}; a step computes up to two blocks of {block_length}. Raise it to at least "
                f"{2 * block_length}."
            )
    if not options.fused_commit and model.hf_config.logits_shift:
        raise OSDTError(
            "fused_commit is false, but this model's forward of a finished block gives the next block's first token "
            "and denoises nothing; leave it out."
        )
    mode = vllm_config.compilation_config.cudagraph_mode
    if mode not in (None, CUDAGraphMode.NONE):
        raise OSDTError(
            f"cudagraph_mode is {mode.name}, but a step of this model has as many queries as blocks, and with a "
            "sub-block's cache fewer rows than were scheduled, which a captured graph cannot know; set "
            '"cudagraph_mode": "NONE" in --compilation-config.'
        )
    vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    _choose_attention(vllm_config.attention_config, cache.cache_dtype)
    changed = []
    if model.max_model_len < block_length:
        raise OSDTError(f"max_model_len is {model.max_model_len}, less than one block of {block_length}; raise it.")
    if model.max_model_len % block_length:
        scheduler.max_model_len = model.max_model_len = model.max_model_len // block_length * block_length
        changed.append(
            f"the end of the context (max_model_len is {model.max_model_len}, whole blocks of {block_length})"
        )
    _refuse_if_asked("enable_chunked_prefill", False, "this model's prompts are cut at block boundaries")
    if not scheduler.enable_chunked_prefill:
        scheduler.enable_chunked_prefill = True
        changed.append("whole prompts in one step (they are cut at block boundaries)")
    if not cache.enable_prefix_caching:
        return changed
    if not cache.user_specified_block_size:
        cache.block_size = math.lcm(SMALLEST_PAGE["cpu" if current_platform.is_cpu() else "gpu"], block_length)
        cache.user_specified_block_size = True  # or the platform would choose
    if cache.block_size % block_length:
        reason = f"pages of block_size {cache.block_size} cut this model's blocks of {block_length}"
        _refuse_if_asked("enable_prefix_caching", True, reason)
        cache.enable_prefix_caching = False
        changed.append(f"prefix caching (pages of --block-size {cache.block_size} cut blocks of {block_length})")
    return changed


def _set_default_sampling(model: "ModelConfig") -> None:
    """Sampling parameters of requests that say nothing: greedy unless checkpoint or operator set a temperature; and
    nothing that every request would be refused for, though the checkpoint's generation_config.json asks for it.

    Raises:
        OSDTError: The operator asks for it.
    """
    checkpoint = {} if model.generation_config == "vllm" else model.try_get_generation_config()
    operator = model.override_generation_config
    asked = {name: operator[name] for name in NEUTRAL_SAMPLING if operator.get(name) is not None}
    refused = {name: value for name, value in asked.items() if value not in NEUTRAL_SAMPLING[name]}
    if refused:
        raise OSDTError(
            f"override_generation_config sets {refused}, which these models do not implement, so that every request "
            "would be refused; leave it out."
        )
    dropped = {
        name: checkpoint[name]
        for name, neutral in NEUTRAL_SAMPLING.items()
        if checkpoint.get(name, neutral[0]) not in neutral
    }
    for name in dropped:
        operator.setdefault(name, None)  # which vLLM leaves out
    if dropped:
        logger.info_once(
            "vllm-osdt leaves out what it cannot do of the checkpoint's generation_config.json: %s.", str(dropped)
        )
    if operator.get("temperature") is None and ("temperature" in operator or checkpoint.get("temperature") is None):
        operator["temperature"] = 0.0


def check_attention(name: str) -> None:
    """Refuse an attention backend that keeps page tables in buffers of ``max_num_seqs`` requests: it has no room
    for a block-causal model's blocks, each of which is a request to it.

    Raises:
        OSDTError: It is one of those.
    """
    if name in BACKENDS_WITH_BUFFERS:
        raise OSDTError(
            f"attention backend {name} holds as many requests as max_num_seqs says, but to attention every block of "
            "this model's rows is one; choose FLASH_ATTN or TRITON_ATTN with --attention-backend."
        )


def _choose_attention(attention: "AttentionConfig", cache_dtype: str) -> None:
    """Keep vLLM from choosing such a backend. (The runner looks at what has been chosen in the end.)"""
    if attention.backend is not None:
        check_attention(attention.backend.name)
    elif current_platform.is_cuda() and cache_dtype not in UNQUANTISED_CACHE:
        attention.backend = AttentionBackendEnum.TRITON_ATTN  # where FLASH_ATTN cannot, FLASHINFER would be next


def _check_rope_range(model: "ModelConfig") -> None:
    """vLLM's tables of a YaRN model end with the scaled range; it does not look whether the context does.

    Raises:
        OSDTError: The context is longer.
    """
    rope = model.hf_config.rope_parameters or {}
    if rope.get("rope_type") != "yarn":
        return
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    if model.max_model_len > original * factor:
        raise OSDTError(
            f"max_model_len is {model.max_model_len}, but the model's YaRN scaling stretches {original} positions by "
            f"{factor:g}, to {int(original * factor)}. Lower --max-model-len or raise the factor."
        )


def _settle_canvas_length(vllm_config: "VllmConfig") -> None:
    """vLLM's ``--diffusion-config`` names what is denoised together ``canvas_length``: our block.

    Raises:
        OSDTError: It contradicts ours, is no length of a block, or bounds the denoising steps, which policies do here.
    """
    asked, hf_config = vllm_config.diffusion_config, vllm_config.model_config.hf_config
    if asked is None or not ASKED.get().get("diffusion_config"):
        return
    if asked.max_denoising_steps is not None:
        raise OSDTError(
            f"diffusion_config sets max_denoising_steps to {asked.max_denoising_steps}; here a policy decides that. "
            'Leave it out and set steps_per_block and the policy in --osdt-config, such as {"policy": "fixed_steps", '
            f'"steps_per_block": {asked.max_denoising_steps}}}.'
        )
    if asked.canvas_length is None:
        return
    own = _operator_values(vllm_config).get("block_length", asked.canvas_length)
    if own != asked.canvas_length:
        raise OSDTError(
            f"diffusion_config sets canvas_length to {asked.canvas_length}, but --osdt-config sets block_length, which "
            f"is the same, to {own}; leave one of them out."
        )
    hf_config.block_length = asked.canvas_length
    hf_config.check_fields()


def _settle_block_length(model: "ModelConfig", operator: dict[str, Any]) -> None:
    """Where a checkpoint's config does not say its block length, its name does ("SDAR-8B-Chat-b32")."""
    hf_config = model.hf_config
    named = re.search(r"-b(\d+)(?=$|[-_])", model_name(model.model).rsplit("/", 1)[-1])
    length = int(named[1]) if named else None
    asked = {*operator, *(model.hf_overrides if isinstance(model.hf_overrides, dict) else ())}
    if ASKED.get().get("diffusion_config"):
        asked.add("canvas_length")
    if not getattr(hf_config, "is_block_causal", False) or asked & {"block_length", "block_size", "canvas_length"}:
        return
    if length == hf_config.block_length:
        return
    if hf_config.block_length != getattr(hf_config, "assumed_block_length", None):
        if length is not None:
            logger.warning_once(
                "%s sounds like blocks of %d, but its config says %d, which is used. Override with "
                "--hf-overrides '{\"block_length\": %d}'.", model.model, length, hf_config.block_length, length,
            )  # fmt: skip
    elif length is not None and 1 <= length <= MAX_BLOCK_LENGTH:
        hf_config.block_length = length
        logger.info_once("vllm-osdt takes the block length %d from the name of %s.", length, model.model)
    else:
        logger.warning_once(
            "The config of %s does not say how long its blocks are; %d is assumed. If they are longer or shorter, "
            "--hf-overrides '{\"block_length\": LENGTH}' says it.", model.model, hf_config.block_length,
        )  # fmt: skip


def has_fast_bfloat16() -> bool:
    """Whether matrix products in bfloat16 are not slower than in float32 on this CPU: AVX512-BF16 or AMX on x86."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True  # vLLM's own choice stands
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def describe_engine(vllm_config: "VllmConfig") -> str:
    """What was decided for an engine, for its log: policy, tasks, block, canvas, cache, profiles."""
    options = server_defaults(vllm_config)
    limits, store = canvas_limits(vllm_config, options), open_store(vllm_config)
    if options.task is None:
        task = "requests that name no task: static threshold"
    else:
        task = f"requests that name no task: task {options.task!r}"
    kept = "profiles in memory only"
    if store is not None:
        try:
            number = sum(name.endswith(".json") for name in os.listdir(store.folder))
            found = f"{number} task{'s' * (number != 1)}"
        except FileNotFoundError:
            found = "0 tasks"
        except OSError as error:
            found = f"cannot be read ({error.strerror})"
        kept = f"profiles of this model in {store.folder}: {found}"
    canvas = f"canvas without max_tokens {limits.default_length}, "
    if options.cache == BLOCK_CACHE:
        canvas = ""
    return (
        f"vllm-osdt decodes with policy {options.policy}, static threshold {options.threshold:g}; a task calibrates on "
        f"{options.calibrations} request{'s' * (options.calibrations != 1)} (metric {options.metric}); {task}; block "
        f"length {options.block_length}, {canvas}cache {options.cache}; {kept}."
    )


class CanvasModelConfig(VerifyAndUpdateConfig):
    """vLLM's hook for a model's engine settings."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Serve in float32 on a CPU whose bfloat16 is slow, if the operator names no dtype."""
        is_half = model_config.dtype in (torch.bfloat16, torch.float16)
        is_free = ASKED.get().get("dtype") == "auto"
        is_quantized = model_config.quantization or getattr(model_config.hf_config, "quantization_config", None)
        if current_platform.is_cpu() and is_half and is_free and not is_quantized:
            if not has_fast_bfloat16():
                logger.warning_once(
                    "This CPU has neither AVX512-BF16 nor AMX, where %s is slower than float32: vllm-osdt serves in "
                    "float32. --dtype bfloat16 halves the memory.", str(model_config.dtype).removeprefix("torch.")
                )  # fmt: skip
                model_config.dtype = torch.float32

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Set scheduler, worker and diffusion config; switch off or refuse what cannot work.

        Raises:
            OSDTError: The engine arguments ask for something that these models cannot do.
        """
        parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
        if parallel.pipeline_parallel_size > 1:
            raise OSDTError(
                f"pipeline_parallel_size is {parallel.pipeline_parallel_size}; diffusion models of vllm-osdt run on "
                "one pipeline stage. Use --tensor-parallel-size instead."
            )
        for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
            if getattr(parallel, name) > 1:
                raise OSDTError(f"{name} is {getattr(parallel, name)}; diffusion models of vllm-osdt need 1.")
        for name, what in (
            ("speculative_config", "speculative decoding"),
            ("kv_transfer_config", "KV transfer"),
        ):
            if getattr(vllm_config, name) is not None:
                raise OSDTError(f"{what} is set, but a diffusion canvas is rewritten in place; remove {name}.")
        if scheduler.prefill_schedule_interval > 1:
            raise OSDTError(
                f"prefill_schedule_interval is {scheduler.prefill_schedule_interval}; a canvas starts as soon as a "
                "refresh fits the step. Leave it at 1 and limit a step with --max-num-batched-tokens."
            )
        if scheduler.scheduler_cls not in (None, SCHEDULER_CLS):
            raise OSDTError(f"scheduler_cls is {scheduler.scheduler_cls!r}; leave it unset: these models need ours.")

        hf_config = vllm_config.model_config.hf_config
        has_experts_on_cpu = current_platform.is_cpu() and getattr(hf_config, "num_experts", 0)
        if has_experts_on_cpu and vllm_config.lora_config is not None:
            raise OSDTError(
                "enable_lora is set, but vLLM has no kernels for adapters of a model with experts on a CPU; merge the "
                "adapter into the weights."
            )
        if has_experts_on_cpu and parallel.data_parallel_size > 1:
            raise OSDTError(
                f"data_parallel_size is {parallel.data_parallel_size}, but vLLM cannot exchange experts' inputs "
                "between engines on a CPU; use --tensor-parallel-size, or servers of their own."
            )
        hf_config.check_fields()
        hf_config.check_mask_token()
        _check_rope_range(vllm_config.model_config)
        _settle_canvas_length(vllm_config)
        _settle_block_length(vllm_config.model_config, _operator_values(vllm_config))
        defaults = server_defaults(vllm_config)
        options = server_options(vllm_config)  # refuses a bad value before anything is loaded
        vllm_config.diffusion_config = DiffusionConfig(canvas_length=defaults.block_length)
        scheduler.scheduler_cls = SCHEDULER_CLS
        switched_off = []
        _refuse_if_asked("async_scheduling", True, "a step's plan needs the last one's outcome")
        if scheduler.async_scheduling is not False:
            scheduler.async_scheduling = False
            switched_off.append("async scheduling (a step's plan needs the last one's outcome)")
        if defaults.cache == BLOCK_CACHE:
            switched_off += _set_up_block_causal(vllm_config, defaults.block_length, options)
        else:
            switched_off += _set_up_full_attention(vllm_config, options)
        if switched_off:
            logger.info_once("vllm-osdt switches off what this model family cannot use: %s.", "; ".join(switched_off))

        vllm_config.attention_config.use_non_causal = True
        compilation = vllm_config.compilation_config
        if compilation.mode is None:
            compilation.mode = CompilationMode.NONE
        if compilation.mode == CompilationMode.NONE and compilation.cudagraph_mode is None:
            compilation.cudagraph_mode = CUDAGraphMode.NONE
        # vLLM's own sends requests with grammars and log probabilities; ours is in ``worker.warmup``.
        vllm_config.kernel_config.enable_jit_warmup = False
        if current_platform.is_cpu():
            from vllm_osdt.cpu import kernels

            kernels.register()
            priority = vllm_config.kernel_config.ir_op_priority.fused_add_rms_norm
            if kernels.PROVIDER not in priority and not priority[:-1]:
                priority.insert(0, kernels.PROVIDER)
        if parallel.worker_cls == "auto":
            device = "cpu" if current_platform.is_cpu() else "gpu"
            parallel.worker_cls = f"vllm_osdt.worker.{device}_worker.CanvasWorker"
        _check_gen_length(vllm_config, defaults)
        _set_default_sampling(vllm_config.model_config)
