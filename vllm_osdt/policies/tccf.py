"""TCCF, think coarse and critic fine: long blocks until thinking has ended, short ones for the answer.

Source: TDAR (arXiv 2602.09555) and the authors' evaluation (``tdar_sample_tccf.py`` of LuLuLuyi/TDAR). They let one
engine write in blocks of 16 until ``</think>``, which it leaves out, put "Let's check if there are any mistakes and
give the final answer." in its place, and give all of that as a prompt to a second engine with blocks of 1. Here one
request does both. What it has written is read anew in the answer's blocks, as there. Deviations: an answer that ends
without the token ends, where theirs goes on; tokens are not made to text and back; ``max_tokens`` bounds both parts and
the check prompt, where theirs has a limit for each. Works beside every policy; ``engine.scheduler`` switches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from vllm_osdt.declaration import option
from vllm_osdt.geometry import BlockLength

THINK_END = "</think>"
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


@dataclass(frozen=True)
class TCCFOptions:
    """What happens once a request has ended its thinking."""

    answer_block_length: int | None = option(
        None,
        BlockLength | None,
        "TCCF (arXiv 2602.09555): behind the first `think_end_token` of its output, a request is decoded in blocks of "
        "this length, a divisor of `block_length`. The authors take 16 and then 1. `null`: in `block_length` to its "
        "end.",
        unit="tokens",
    )
    think_end_token: int | str | None = option(
        None,
        Annotated[int, Field(ge=0)] | str | None,
        "Of `answer_block_length`: the token that ends thinking, as its id or its text.",
        expected="a token id, or the text of one token",
        default_text="`</think>`",
        needs="answer_block_length",
    )
    check_prompt: str | Sequence[int] | None = option(
        None,
        str | TokenIds | None,
        "Of `answer_block_length`: text or token ids that take the place of `think_end_token`, which the model then "
        "goes on from. They are part of the output. `null`: the token stays, and nothing is added.",
        expected="text or a list of token ids",
        needs="answer_block_length",
    )
