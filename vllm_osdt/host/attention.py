"""Which of vLLM's attention backends can take a block-causal model's blocks."""

from vllm_osdt.errors import OSDTError

BACKENDS_WITH_BUFFERS = ("FLASHINFER", "FLEX_ATTENTION")
UNQUANTIZED_CACHE = ("auto", "bfloat16", "float16", "float32")


def check_attention(name: str) -> None:
    """Refuse an attention backend that keeps page tables in buffers of ``max_num_seqs`` requests.

    It has no room for a block-causal model's blocks, each of which is a request to it.

    Raises:
        OSDTError: It is one of those.
    """
    if name in BACKENDS_WITH_BUFFERS:
        raise OSDTError(
            f"attention backend {name} holds as many requests as max_num_seqs says, but to attention every block of "
            "this model's rows is one; choose FLASH_ATTN or TRITON_ATTN with --attention-backend."
        )
