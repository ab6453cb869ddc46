"""LLaDA-MoE: a mixture of experts, norms on query and key heads, attention over the whole canvas.

Source: LLaDA-MoE (arXiv 2509.24389). A position is predicted from its own logits (no shift). vLLM's layers of Qwen3-MoE
are the same, with an expert's share of the softmax over all experts as its weight, and the weights have their names.
"""

from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from vllm_osdt.models.canvas_mixin import CanvasMixin


class LLaDAMoEModelLM(CanvasMixin, Qwen3MoeForCausalLM):
    """LLaDA-MoE-7B-A1B, Base and Instruct."""
