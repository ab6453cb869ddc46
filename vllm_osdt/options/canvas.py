"""The canvas of a request, and that of its answer behind the end of thinking: where options and lengths meet."""

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_osdt.declaration import declarations
from vllm_osdt.geometry import (
    Canvas,
    CanvasRequest,
    Limits,
    block_causal_canvas,
    full_attention_canvas,
    rest_of_canvas,
)
from vllm_osdt.options import DEFAULTS, DecodingOptions
from vllm_osdt.policies import POLICIES
from vllm_osdt.policies.tccf import TCCFOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def canvas_limits(vllm_config: "VllmConfig", gen_length: int | None) -> Limits:
    """What bounds the canvases of an engine.

    Args:
        vllm_config: The engine's configuration.
        gen_length: The operator's.
    """
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    max_num_batched_tokens = scheduler.max_num_batched_tokens
    return Limits(
        max_model_len=model.max_model_len,
        max_num_batched_tokens=min(
            max_num_batched_tokens, scheduler.max_num_scheduled_tokens or max_num_batched_tokens
        ),
        gen_length=gen_length,
        # max_new_tokens, the operator's or the checkpoint's
        open_ended=model.get_diff_sampling_param().get("max_tokens"),
        usual_length=model.hf_config.traits.gen_length,
    )


def resolve_canvas(
    options: DecodingOptions,
    *,
    prompt_length: int,
    max_tokens: int | None,
    limits: Limits,
    max_tokens_name: str = "max_tokens",
    canvas: Canvas | None = None,
) -> tuple[DecodingOptions, Canvas]:
    """Fix the canvas and check that prompt and canvas fit.

    Args:
        options: The request's options; ``gen_length`` is None unless it asks for one itself.
        prompt_length: Prompt tokens.
        max_tokens: The request's limit on output tokens; None when it names none.
        limits: See there.
        max_tokens_name: What the client calls its limit.
        canvas: The canvas, where it is known already.

    Returns:
        The options with ``gen_length``, and what the policy makes of it (``steps``), and the canvas. A canvas is whole
        blocks; where the context or a forward pass ends sooner, its last block ends there too.

    Raises:
        InvalidOptionError: The canvas does not fit, is asked for with a part of a block, or ``steps`` does not divide.
    """
    asked = CanvasRequest(
        prompt_length,
        max_tokens,
        options.gen_length,
        options.block_length,
        max_tokens_name,
        options.sub_block_length,
        options.is_block_causal,
        can_grow=options.steps is None,  # which is shared out among all blocks
        is_on_grid=options.is_on_grid,
    )
    if canvas is None:
        find = block_causal_canvas if options.is_block_causal else full_attention_canvas
        canvas = find(asked, limits)
    resolved = POLICIES[options.policy].resolve(options, asked, canvas)
    return replace(options, gen_length=canvas.length, **resolved), canvas


def answer_options(options: DecodingOptions) -> DecodingOptions:
    """The options of what follows the end of thinking, before they are resolved; ``answer_block_length`` is set."""
    length, steps = options.answer_block_length, options.steps_per_block
    own = {name: DEFAULTS[name] for name in declarations(TCCFOptions)}
    own |= {"block_length": length, "gen_length": None, "steps": None}
    own["steps_per_block"] = None if steps is None else min(steps, length)
    return replace(options, **own)


def resolve_answer(options: DecodingOptions, canvas: Canvas, position: int) -> tuple[DecodingOptions, Canvas]:
    """Options and canvas from the end of thinking on, as of a request whose prompt ends there.

    Args:
        options: Of the request; ``answer_block_length`` is set.
        canvas: Of the request.
        position: Where the answer begins.

    Raises:
        InvalidOptionError: The policy has no blocks of that length.
    """
    own = answer_options(options)
    rest = rest_of_canvas(
        canvas,
        position,
        own.block_length,
        is_block_causal=own.is_block_causal,
        is_on_grid=own.is_on_grid,
    )
    asked = CanvasRequest(
        position,
        canvas.max_output_end - position,
        None,
        own.block_length,
        sub_block_length=own.sub_block_length,
        is_block_causal=own.is_block_causal,
        is_on_grid=own.is_on_grid,
    )
    resolved = POLICIES[own.policy].resolve(own, asked, rest)
    return replace(own, gen_length=rest.length, **resolved), rest
