"""LLaDA2.0 and 2.1 (mini, flash): Ling 2.0's layers, a mixture of experts, under a block-causal mask.

Source: LLaDA2.0 (arXiv 2512.15745) and LLaDA2.1 (arXiv 2602.08676). A position is predicted from its own logits.
Weights have Ling's names; experts are routed in groups, with a bias that chooses but does not weigh, beside a shared
expert.
"""

from vllm.model_executor.models.bailing_moe import BailingMoeV2ForCausalLM

from vllm_osdt.models.canvas_mixin import CanvasMixin


class LLaDA2MoeModelLM(CanvasMixin, BailingMoeV2ForCausalLM):
    """vLLM's Ling 2.0; ``LLaDA2MoeConfig`` states what Ling's own configs would."""
