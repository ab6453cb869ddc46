"""How much a stage does: on a GPU, and in tiny sizes on the stand-in for CUDA."""

import sys
from dataclasses import dataclass

IS_STAND_IN = "--stand-in" in sys.argv


@dataclass(frozen=True)
class Sizes:
    """How much a stage does.

    Attributes:
        vocabularies, rows, blocks: Of the kernels; a block is number and length.
        lm_head: Vocabulary and hidden size, of LLaDA-8B.
        lm_head_rows: Rows at which it is compared with written logits.
        num_cases: Of a recorded family; None: all.
        num_problems, num_tasks: Of a bundled model.
        num_samples: Equal requests that are sampled in one batch.
        num_policies: Of those that are tried with every cache mode.
        requests: At a time, of a large shape.
        tokens_per_forward: Of a large shape; the first is what is measured first.
        prompt_length: In tokens, of a large shape.
        max_tokens: Of a large shape: two of the longest blocks.
        shape: Fields of the large shapes that are replaced.
        max_num_seqs: Of engines of small models.
        capture_sizes: Rows of the graphs that an engine captures; None: its own choice.
    """

    vocabularies: tuple[int, ...] = (203, 126464, 151936, 262144)
    rows: tuple[int, ...] = (1, 32, 256, 1024)
    blocks: tuple[tuple[int, int], ...] = ((1, 32), (64, 8), (64, 32), (256, 32), (32, 64), (8, 128))
    lm_head: tuple[int, int] = (126464, 4096)
    lm_head_rows: tuple[int, ...] = (1, 8, 32, 128, 256, 512, 1024, 4096)
    num_cases: int | None = None
    num_problems: int = 64
    num_tasks: int | None = None
    num_samples: int = 16
    num_policies: int | None = None
    requests: tuple[int, ...] = (1, 8, 32, 128)
    tokens_per_forward: tuple[int, ...] = (4, 16, 1)
    prompt_length: int = 128
    max_tokens: int = 64
    shape: tuple[tuple[str, int], ...] = ()
    max_num_seqs: int = 64
    capture_sizes: tuple[int, ...] | None = None


TINY = Sizes(
    vocabularies=(203,),
    rows=(1, 4),
    blocks=((1, 32), (3, 8)),
    lm_head=(203, 64),
    lm_head_rows=(1, 3),
    num_cases=1,
    num_problems=2,
    num_tasks=1,
    num_samples=2,
    num_policies=1,
    requests=(1, 2),
    tokens_per_forward=(8,),
    prompt_length=16,
    max_tokens=32,
    shape=(
        ("d_model", 64), ("n_heads", 2), ("n_kv_heads", 2), ("n_layers", 2), ("mlp_hidden_size", 128),
        ("hidden_size", 64), ("num_attention_heads", 2), ("num_key_value_heads", 1), ("num_hidden_layers", 2),
        ("intermediate_size", 128), ("vocab_size", 512), ("embedding_size", 512), ("mask_token_id", 511),
        ("eos_token_id", 510), ("pad_token_id", 510), ("num_experts", 8), ("num_experts_per_tok", 2), ("n_group", 4),
        ("topk_group", 2), ("moe_intermediate_size", 32), ("head_dim", 32),
    ),
    max_num_seqs=4,
    capture_sizes=(32, 64),
)  # fmt: skip
SIZES = TINY if IS_STAND_IN else Sizes()
