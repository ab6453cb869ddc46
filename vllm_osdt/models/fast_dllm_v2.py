"""Fast-dLLM v2: Qwen2.5's layers under a block-causal mask, sub-blocks within a block.

Source: Fast-dLLM v2 (arXiv 2509.26328). Position i is predicted from the logits at i - 1, as in the model that it was
trained from. Weights have Qwen2's names.
"""

from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

from vllm_osdt.models.canvas_mixin import CanvasMixin


class FastDLLMv2ForCausalLM(CanvasMixin, Qwen2ForCausalLM):
    """Fast_dLLM_v2_1.5B and 7B."""
