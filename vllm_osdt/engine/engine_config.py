"""Engine settings of the model families, set so that users need no flag."""

import math
import os
import platform
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from vllm.config import CompilationMode, CUDAGraphMode, DiffusionConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_osdt.calibration.fingerprint import model_name
from vllm_osdt.calibration.store import open_store
from vllm_osdt.errors import OSDTError
from vllm_osdt.geometry import MAX_BLOCK_LENGTH
from vllm_osdt.host.attention import BACKENDS_WITH_BUFFERS, UNQUANTIZED_CACHE, check_attention
from vllm_osdt.host.compat.settings import ASKED
from vllm_osdt.options import DecodingOptions, ServerOptions
from vllm_osdt.options.canvas import canvas_limits
from vllm_osdt.options.operator import default_decoding_options, operator_values, server_options
from vllm_osdt.policies import POLICIES
from vllm_osdt.sampling import UNSUPPORTED_SAMPLING_PARAMS

if TYPE_CHECKING:
    from vllm.config import AttentionConfig, ModelConfig, VllmConfig

logger = init_logger("vllm.vllm_osdt.engine.engine_config")

# Tokens of the smallest KV page that attention runs well with; small pages share more of two prompts.
SMALLEST_PAGE = {"cpu": 32, "gpu": 16}
# Numbers of rows for which CUDA graphs are captured, before they are rounded up to whole blocks. A step of an 8B model
# with more rows takes longer than its launches.
CAPTURE_SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
SCHEDULER_CLS = "vllm_osdt.engine.scheduler.CanvasScheduler"


def _check_gen_length(vllm_config: "VllmConfig", defaults: DecodingOptions) -> None:
    """The operator's canvas length must be one that a request can have; it comes before the checkpoint's.

    Raises:
        OSDTError: It is no whole number of blocks, or longer than the engine's limits.
    """
    if defaults.gen_length is None:
        return
    limits = canvas_limits(vllm_config, defaults.gen_length)
    longest = min(limits.max_model_len, limits.max_num_batched_tokens) - 1
    if defaults.gen_length % defaults.block_length or defaults.gen_length > longest:
        raise OSDTError(
            f"gen_length is {defaults.gen_length}; it must be a multiple of block_length {defaults.block_length}, and "
            f"at most {longest}: with a prompt it must fit max_model_len {limits.max_model_len} and "
            f"max_num_batched_tokens {limits.max_num_batched_tokens}."
        )
    # What the checkpoint says to requests without a limit; None is left out by vLLM.
    vllm_config.model_config.override_generation_config.setdefault("max_new_tokens", None)


def _check_load_bounds(vllm_config: "VllmConfig", defaults: DecodingOptions, options: ServerOptions) -> None:
    """Bounds of the load must lie among the rows that steps have.

    Raises:
        OSDTError: No step of an engine would have fewer drafts, or no request of the served block length any, or none
            at all with this attention.
    """
    if options.load_aware is None:
        return
    backend = vllm_config.attention_config.backend
    if backend is not None and backend.name in BACKENDS_WITH_BUFFERS:
        raise OSDTError(
            f"load_aware is set, but attention backend {backend.name} takes no drafts beside a block; leave one of "
            "them out."
        )
    low, high = options.load_aware
    scheduler = vllm_config.scheduler_config
    max_rows = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    if low >= max_rows:
        raise OSDTError(
            f"load_aware has low {low}, but no step has more rows than max_num_batched_tokens {max_rows}, so that no "
            "draft would ever give way. Lower it, or leave load_aware out."
        )
    if high <= defaults.block_length:
        raise OSDTError(
            f"load_aware has high {high}, but a step of one request has block_length {defaults.block_length} rows, so "
            f"that none would have drafts. Raise it above {defaults.block_length}, or leave load_aware out."
        )


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
    if vllm_config.attention_config.backend is not None:
        check_attention(vllm_config.attention_config.backend.name, is_block_causal=False)
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
    blocks. Those of a model that commits causally depend on what is before them, and its blocks lie on no grid.
    """
    cache, scheduler, model = vllm_config.cache_config, vllm_config.scheduler_config, vllm_config.model_config
    for name in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
        max_rows = getattr(scheduler, name)
        if max_rows is not None and max_rows < 2 * block_length:
            raise OSDTError(
                f"{name} is {max_rows}; a step computes up to two blocks of {block_length}. Raise it to at least "
                f"{2 * block_length}."
            )
    is_causal = model.hf_config.commits_causally
    if not options.fused_commit and (model.hf_config.logits_shift or is_causal):
        reason = "this model's forward of a finished block gives the next block's first token and denoises nothing"
        if is_causal:
            reason = "cache_mode says what this model's forward of a finished block does, 'causal' or 'causal_fused'"
        raise OSDTError(f"fused_commit is false, but {reason}; leave it out.")
    _choose_attention(vllm_config.attention_config, cache.cache_dtype, mixes_causal=is_causal)
    grain = 1 if is_causal else block_length
    changed = []
    if model.max_model_len < block_length:
        raise OSDTError(f"max_model_len is {model.max_model_len}, less than one block of {block_length}; raise it.")
    if model.max_model_len % grain:
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
        cache.block_size = math.lcm(SMALLEST_PAGE["cpu" if current_platform.is_cpu() else "gpu"], grain)
        cache.user_specified_block_size = True  # or the platform would choose
    if cache.block_size % grain:
        reason = f"pages of block_size {cache.block_size} cut this model's blocks of {block_length}"
        _refuse_if_asked("enable_prefix_caching", True, reason)
        cache.enable_prefix_caching = False
        changed.append(f"prefix caching (pages of --block-size {cache.block_size} cut blocks of {block_length})")
    return changed


def _set_default_sampling(model: "ModelConfig") -> None:
    """Sampling parameters of requests that say nothing: greedy unless checkpoint or operator set a temperature.

    And nothing that every request would be refused for, though the checkpoint's generation_config.json asks for it.

    Raises:
        OSDTError: The operator asks for it.
    """
    checkpoint = {} if model.generation_config == "vllm" else model.try_get_generation_config()
    operator = model.override_generation_config
    asked = {name: operator[name] for name in UNSUPPORTED_SAMPLING_PARAMS if operator.get(name) is not None}
    refused = {name: value for name, value in asked.items() if value not in UNSUPPORTED_SAMPLING_PARAMS[name]}
    if refused:
        raise OSDTError(
            f"override_generation_config sets {refused}, which these models do not implement, so that every request "
            "would be refused; leave it out."
        )
    dropped = {
        name: checkpoint[name]
        for name, neutral in UNSUPPORTED_SAMPLING_PARAMS.items()
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


def _choose_attention(attention: "AttentionConfig", cache_dtype: str, *, mixes_causal: bool = False) -> None:
    """Keep vLLM from choosing a backend that cannot take a block-causal model's queries.

    (The runner looks at what has been chosen in the end.)
    """
    if attention.backend is not None:
        check_attention(attention.backend.name, is_block_causal=True)
    elif current_platform.is_cuda() and (mixes_causal or cache_dtype not in UNQUANTIZED_CACHE):
        attention.backend = AttentionBackendEnum.TRITON_ATTN  # where FLASH_ATTN cannot, FLASHINFER would be next


def capture_sizes(block_length: int, max_num_tokens: int, asked: Sequence[int] | None = None) -> list[int]:
    """Numbers of rows for which graphs are captured: whole blocks, ascending.

    Args:
        block_length: Of the served blocks.
        max_num_tokens: Rows of a step at most.
        asked: The operator's sizes; None: ours.
    """
    sizes = CAPTURE_SIZES if asked is None else asked
    rounded = {-(-size // block_length) * block_length for size in sizes}
    return sorted(size for size in rounded if size <= max_num_tokens)


def _choose_graphs(vllm_config: "VllmConfig", block_length: int) -> None:
    """Whole steps as CUDA graphs on a GPU, unless the operator wants none.

    Raises:
        OSDTError: The operator asks for piecewise graphs alone.
    """
    compilation = vllm_config.compilation_config
    if compilation.mode is None:
        compilation.mode = CompilationMode.NONE
    if compilation.cudagraph_mode is None:
        is_without = current_platform.is_cpu() or _shares_steps(vllm_config)
        compilation.cudagraph_mode = CUDAGraphMode.NONE if is_without else CUDAGraphMode.FULL
    if compilation.cudagraph_mode == CUDAGraphMode.PIECEWISE:
        raise OSDTError(
            "cudagraph_mode is PIECEWISE, but these models capture whole steps; leave it out, or set FULL or NONE."
        )
    if not compilation.cudagraph_mode.has_full_cudagraphs() or vllm_config.model_config.enforce_eager:
        return
    if _shares_steps(vllm_config):
        raise OSDTError(
            f"cudagraph_mode is {compilation.cudagraph_mode.name}, but no step of experts shared by "
            "data-parallel ranks runs as a graph; leave it out."
        )
    if vllm_config.lora_config is not None and vllm_config.lora_config.specialize_active_lora:
        raise OSDTError(
            "specialize_active_lora is set, but its graphs would leave out rows without an adapter; leave it out, or "
            "set --enforce-eager."
        )
    most = vllm_config.scheduler_config.max_num_batched_tokens
    most = min(most, compilation.max_cudagraph_capture_size or most)
    sizes = capture_sizes(block_length, most, compilation.cudagraph_capture_sizes)
    compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = sizes, max(sizes, default=0)
    if not sizes:
        compilation.cudagraph_mode = CUDAGraphMode.NONE


def _shares_steps(vllm_config: "VllmConfig") -> bool:
    """Whether data-parallel ranks must agree on the rows of every step: such steps are no graphs."""
    has_experts: bool = vllm_config.model_config.hf_config.traits.has_experts
    return has_experts and vllm_config.parallel_config.data_parallel_size > 1


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
    own = operator_values(vllm_config).get("block_length", asked.canvas_length)
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
    if not hf_config.is_block_causal or asked & {"block_length", "block_size", "canvas_length"}:
        return
    if length == hf_config.block_length:
        return
    if hf_config.block_length != hf_config.assumed_block_length:
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
    options = default_decoding_options(vllm_config)
    limits = canvas_limits(vllm_config, options.gen_length)
    store = open_store(server_options(vllm_config).profile_dir, vllm_config)
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
    canvas = f"canvas {limits.first_length}, and more when an answer needs it, "
    if options.is_block_causal:
        canvas = ""
    number = options.num_calibration_requests
    return (
        f"vllm-osdt decodes with policy {options.policy}, static threshold {options.threshold:g}; a task calibrates on "
        f"{number} request{'s' * (number != 1)} (statistic {options.statistic}); {task}; block "
        f"length {options.block_length}, {canvas}cache mode {options.cache_mode}; {kept}."
    )


class Refusal(NamedTuple):
    """Engine settings that these models cannot run with.

    Attributes:
        applies: Whether an engine's configuration has them.
        message: For the operator; ``c`` is the configuration, ``parallel`` and ``scheduler`` are two of its parts.
    """

    applies: Callable[["VllmConfig"], bool]
    message: str


def _has_experts_on_cpu(config: "VllmConfig") -> bool:
    return current_platform.is_cpu() and config.model_config.hf_config.traits.has_experts


def _fuses_lm_head(config: "VllmConfig") -> bool:
    return server_options(config).fused_lm_head


def _asks_to_run_ahead(config: "VllmConfig") -> bool:
    """The operator himself does; it is the default."""
    return operator_values(config).get("run_ahead") is True


REFUSALS = (
    Refusal(
        lambda config: config.parallel_config.pipeline_parallel_size > 1,
        "pipeline_parallel_size is {parallel.pipeline_parallel_size}; diffusion models of vllm-osdt run on one "
        "pipeline stage. Use --tensor-parallel-size instead.",
    ),
    Refusal(
        lambda config: config.parallel_config.decode_context_parallel_size > 1,
        "decode_context_parallel_size is {parallel.decode_context_parallel_size}; diffusion models of vllm-osdt need "
        "1.",
    ),
    Refusal(
        lambda config: config.parallel_config.prefill_context_parallel_size > 1,
        "prefill_context_parallel_size is {parallel.prefill_context_parallel_size}; diffusion models of vllm-osdt "
        "need 1.",
    ),
    Refusal(
        lambda config: config.speculative_config is not None,
        "speculative decoding is set, but a diffusion canvas is rewritten in place; remove speculative_config.",
    ),
    Refusal(
        lambda config: bool(config.model_config.logits_processors),
        "logits_processors are set, but nothing would call them for the many positions of a step; remove them.",
    ),
    Refusal(
        lambda config: config.kv_transfer_config is not None,
        "KV transfer is set, but a diffusion canvas is rewritten in place; remove kv_transfer_config.",
    ),
    Refusal(
        lambda config: config.scheduler_config.prefill_schedule_interval > 1,
        "prefill_schedule_interval is {scheduler.prefill_schedule_interval}; a canvas starts as soon as a refresh fits "
        "the step. Leave it at 1 and limit a step with --max-num-batched-tokens.",
    ),
    Refusal(
        lambda config: config.scheduler_config.scheduler_cls not in (None, SCHEDULER_CLS),
        "scheduler_cls is {scheduler.scheduler_cls!r}; leave it unset: these models need ours.",
    ),
    Refusal(
        lambda config: _has_experts_on_cpu(config) and config.lora_config is not None,
        "enable_lora is set, but vLLM has no kernels for adapters of a model with experts on a CPU; merge the adapter "
        "into the weights.",
    ),
    Refusal(
        lambda config: _has_experts_on_cpu(config) and config.parallel_config.data_parallel_size > 1,
        "data_parallel_size is {parallel.data_parallel_size}, but vLLM cannot exchange experts' inputs between engines "
        "on a CPU; use --tensor-parallel-size, or servers of their own.",
    ),
    Refusal(
        lambda config: bool(config.parallel_config.enable_batch_sharded_sampling),
        "enable_batch_sharded_sampling is set, but a canvas is sampled on every rank; leave it out.",
    ),
    # What only the loaded model shows is refused by ``worker.head``.
    Refusal(
        lambda config: _fuses_lm_head(config) and current_platform.is_cpu(),
        "fused_lm_head is true, but it is a kernel for GPUs: a CPU's memory has room for logits, and reading them is "
        "the faster way there; leave it out.",
    ),
    Refusal(
        lambda config: _fuses_lm_head(config) and config.lora_config is not None,
        "fused_lm_head is true and enable_lora is set, but an adapter may change logits, which are not written; leave "
        "one of them out.",
    ),
    Refusal(
        lambda config: _fuses_lm_head(config) and config.model_config.head_dtype != config.model_config.dtype,
        "fused_lm_head is true and head_dtype is {c.model_config.head_dtype}, but its kernel multiplies in the model's "
        "{c.model_config.dtype}; leave one of them out.",
    ),
    Refusal(
        lambda config: (
            server_options(config).fused_lm_head_max_rows is not None and not server_options(config).fused_lm_head
        ),
        "fused_lm_head_max_rows is set, but fused_lm_head is not, whose steps it limits; set both, or leave it out.",
    ),
    Refusal(
        lambda config: (
            _asks_to_run_ahead(config) and current_platform.is_cpu() and config.parallel_config.world_size > 1
        ),
        "run_ahead is true, but on a CPU the {parallel.world_size} ranks of an engine would have to agree on when to "
        "take no further step; leave it out.",
    ),
    Refusal(
        lambda config: (
            _asks_to_run_ahead(config)
            and not current_platform.is_cpu()
            and (config.model_config.enforce_eager or config.compilation_config.cudagraph_mode == CUDAGraphMode.NONE)
        ),
        "run_ahead is true, but CUDA graphs, whose steps are launched ahead, are switched off; leave one of them out.",
    ),
)


class CanvasModelConfig(VerifyAndUpdateConfig):
    """vLLM's hook for a model's engine settings."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Serve in float32 on a CPU whose bfloat16 is slow, if the operator names no dtype."""
        is_half = model_config.dtype in (torch.bfloat16, torch.float16)
        is_free = ASKED.get().get("dtype") == "auto"
        is_quantized = model_config.quantization or getattr(model_config.hf_config, "quantization_config", None)
        is_asked_to_choose = current_platform.is_cpu() and is_half and is_free and not is_quantized
        if is_asked_to_choose and not has_fast_bfloat16():
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
        hf_config = vllm_config.model_config.hf_config
        hf_config.check_fields()
        hf_config.check_mask_token()
        for refusal in REFUSALS:
            if refusal.applies(vllm_config):
                raise OSDTError(refusal.message.format(c=vllm_config, parallel=parallel, scheduler=scheduler))
        _check_rope_range(vllm_config.model_config)
        _settle_canvas_length(vllm_config)
        _settle_block_length(vllm_config.model_config, operator_values(vllm_config))
        defaults = default_decoding_options(vllm_config)
        options = server_options(vllm_config)  # refuses a bad value before anything is loaded
        for policy in POLICIES.values():
            policy.check_operator(defaults, options)
        _check_load_bounds(vllm_config, defaults, options)
        vllm_config.diffusion_config = DiffusionConfig(canvas_length=defaults.block_length)
        scheduler.scheduler_cls = SCHEDULER_CLS
        switched_off = []
        _refuse_if_asked("async_scheduling", True, "a step's plan needs the last one's outcome")
        if scheduler.async_scheduling is not False:
            scheduler.async_scheduling = False
            switched_off.append("async scheduling (a step's plan needs the last one's outcome)")
        if defaults.is_block_causal:
            switched_off += _set_up_block_causal(vllm_config, defaults.block_length, options)
        else:
            switched_off += _set_up_full_attention(vllm_config, options)
        if switched_off:
            logger.info_once("vllm-osdt switches off what this model family cannot use: %s.", "; ".join(switched_off))

        vllm_config.attention_config.use_non_causal = True
        _choose_graphs(vllm_config, defaults.block_length)
        # vLLM's own sends requests with grammars and log probabilities; ours is in ``worker.warmup``.
        vllm_config.kernel_config.enable_jit_warmup = False
        if current_platform.is_cpu():
            from vllm_osdt.host.cpu import kernels

            kernels.register()
            priority = vllm_config.kernel_config.ir_op_priority.fused_add_rms_norm
            if kernels.PROVIDER not in priority and not priority[:-1]:
                priority.insert(0, kernels.PROVIDER)
        if parallel.worker_cls == "auto":
            device = "cpu" if current_platform.is_cpu() else "gpu"
            parallel.worker_cls = f"vllm_osdt.worker.{device}_worker.CanvasWorker"
        _check_gen_length(vllm_config, defaults)
        _set_default_sampling(vllm_config.model_config)
