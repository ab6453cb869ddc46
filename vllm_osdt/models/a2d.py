"""Tiny-A2D: Qwen3, Qwen2 and Llama models turned into diffusion models; attention over the whole canvas, or blocks.

Source: dLLM (github.com/ZHZisZZ/dllm), examples/a2d. Layers and weight names are those of the model that a checkpoint
was made of. A position is predicted from its own logits (no shift). What attention sees, ``A2DConfigMixin`` says.
"""

from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from vllm_osdt.models.canvas_llama import CanvasForCausalLM
from vllm_osdt.models.canvas_mixin import CanvasMixin


class A2DQwen3LMHeadModel(CanvasMixin, Qwen3ForCausalLM):
    """Qwen3-0.6B-diffusion, mdlm and bd3lm."""


class A2DQwen2LMHeadModel(CanvasForCausalLM):
    """Qwen2.5-Coder-0.5B-Instruct-diffusion, mdlm and bd3lm. Llama's layers with biases are Qwen2's."""


class A2DLlamaLMHeadModel(CanvasForCausalLM):
    """A Llama turned into a diffusion model with dLLM."""
