"""Dream and DiffuCoder: Qwen2 layers (grouped keys and values, biases on the attention's inputs) over a whole canvas.

Source: Dream (arXiv 2508.15487). Position i is predicted from the logits at i - 1, as in the autoregressive model that
it was trained from; ``DreamConfig.logits_shift`` says so to the worker.
"""

from vllm_osdt.models.canvas_llama import CanvasForCausalLM


class DreamModel(CanvasForCausalLM):
    """vLLM's Llama layers have what Qwen2's have (``DreamConfig.qkv_bias``), and the weights have their names."""
