"""Which of vLLM's attention backends can take a canvas, and which a step that is a CUDA graph."""

from collections.abc import Iterable

from vllm.config.compilation import CUDAGraphMode

from vllm_osdt.errors import OSDTError

BACKENDS_WITH_BUFFERS = ("FLASHINFER", "FLEX_ATTENTION")
# Their metadata is what a step's queries are, in tensors that a graph can read.
BACKENDS_WITH_GRAPHS = ("FLASH_ATTN", "TRITON_ATTN")
BACKENDS_WITH_MIXED_QUERIES = ("CPU_ATTN", "TRITON_ATTN")
UNQUANTIZED_CACHE = ("auto", "bfloat16", "float16", "float32")


def check_attention(name: str, *, is_block_causal: bool) -> None:
    """Refuse an attention backend that cannot take a canvas.

    One that keeps page tables in buffers of ``max_num_seqs`` requests has no room for a block-causal model's blocks,
    each of which is a request to it. FlashInfer's kernels without a causal mask are those that vLLM itself passes over
    (``platforms/cuda.py``), and no recorded decision has been decoded with them.

    Raises:
        OSDTError: It is one of those.
    """
    if name == "FLASHINFER" and not is_block_causal:
        raise OSDTError(
            "attention backend FLASHINFER is passed over by vLLM itself where positions see what is behind them, since "
            "its kernels for that have faults; choose FLASH_ATTN or TRITON_ATTN with --attention-backend, or none."
        )
    if is_block_causal and name in BACKENDS_WITH_BUFFERS:
        raise OSDTError(
            f"attention backend {name} holds as many requests as max_num_seqs says, but to attention every block of "
            "this model's rows is one; choose FLASH_ATTN or TRITON_ATTN with --attention-backend."
        )


def check_causal_attention(name: str) -> None:
    """Refuse an attention backend that cannot take causal and other queries in one step.

    A model that commits causally has both.

    Raises:
        OSDTError: It is one of those.
    """
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version = get_flash_attn_version() if name == "FLASH_ATTN" else None
    if name not in BACKENDS_WITH_MIXED_QUERIES and version != 4:
        found = name if version is None else f"{name} (FlashAttention {version})"
        raise OSDTError(
            f"attention backend {found} takes a step's queries as all causal or none, but this model has both; choose "
            "TRITON_ATTN with --attention-backend, or leave it out. (FlashAttention 4 would do, too.)"
        )


def graph_mode(mode: CUDAGraphMode, names: Iterable[str]) -> CUDAGraphMode:
    """The mode of CUDA graphs with these attention backends: none, where one plans more on the host than a graph keeps.

    Args:
        mode: The engine's.
        names: Of the backends that vLLM has chosen.
    """
    return mode if all(name in BACKENDS_WITH_GRAPHS for name in names) else CUDAGraphMode.NONE
