"""Stable-DiffCoder: Llama layers with grouped keys and values under a block-causal mask.

Source: Stable-DiffCoder (arXiv 2601.15892) and the decoder that the checkpoints bring. A position is predicted from its
own logits (no shift). Weights have Llama's names.
"""

from vllm_osdt.models.canvas_llama import CanvasForCausalLM


class StableDiffcoderForCausalLM(CanvasForCausalLM):
    """Stable-DiffCoder-8B, Base and Instruct."""
