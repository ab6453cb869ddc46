"""Patches of vLLM's engine core, of its scheduler's KV pages, and of an attention backend's buffers."""

from collections.abc import Callable
from typing import Any

from vllm.utils.math_utils import round_up

from vllm_osdt.host.compat.wrapping import wrap
from vllm_osdt.models.registry import is_canvas_model


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
    wrap(EngineCore, "collective_rpc", make_collective_rpc)
    wrap(EngineCore, "set_weight_version", make_set_weight_version)


def patch_page_allocation(kv_cache_manager: Any, allocate: Callable[..., Any]) -> Callable[..., Any]:
    """The scheduler's request for KV pages goes to ``allocate``, which asks for those of the planned rows.

    Returns vLLM's own function.

    vLLM asks with the rows of the prompt, before it knows those of the canvas. Goes when the scheduler lets a subclass
    say how many tokens a waiting request starts with.
    """
    original = kv_cache_manager.allocate_slots
    kv_cache_manager.allocate_slots = allocate
    return original


def patch_page_caching(kv_cache_manager: Any, num_final: Callable[[Any], int]) -> None:
    """A request's pages enter the prefix cache up to ``num_final`` of it, whoever asks.

    vLLM 0.33 asks for all rows of a step that has output, drafts that it takes for accepted included. Goes when the
    scheduler lets a subclass say how many tokens are final.
    """
    original = kv_cache_manager.cache_blocks

    def cache_blocks(request: Any, num_computed_tokens: int) -> None:
        original(request, min(num_computed_tokens, num_final(request)))

    kv_cache_manager.cache_blocks = cache_blocks


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
