"""iLLaDA-8B: Llama layers with grouped keys and values, attention over the whole canvas.

Source: iLLaDA (arXiv 2606.25331) and the network that its checkpoints bring. A position is predicted from its own
logits (no shift). Weights have Llama's names. Embeddings are tied, and the checkpoints store the output matrix
nevertheless; vLLM ties it if it is the same.
"""

from vllm_osdt.models.canvas_llama import CanvasForCausalLM


class ILLaDAForCausalLM(CanvasForCausalLM):
    """iLLaDA-8B, Base and Instruct."""
