"""Compiles every kernel for a GPU, which takes none: ``TRITON_INTERPRET=0 python tests/kernels/compile_for_gpu.py``.

Triton's interpreter runs what its compiler refuses (a global that is no constexpr, say), so the other tests here do not
show that a kernel compiles. Prints a line per kernel. With ``TEST_ALL=1`` every specialization is compiled.
"""

import itertools

import triton
from selection import TEST_ALL, covering
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from csrc_triton import confidence_kernel, unmask_kernel

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    **dict.fromkeys(["noise_key_ptr", "token_ptr", "slots_ptr", "canvas_index_ptr", "position_ptr"], "*i64"),
    **dict.fromkeys(["end_token_ids_ptr"], "*i64"),
    **dict.fromkeys(["cells_ptr", "num_output_positions_ptr", "min_unmask_ptr", "canvas_ptr", "counts_ptr"], "*i32"),
    **dict.fromkeys(["temperature_ptr", "confidence_ptr", "parameter_ptr", "grid_ptr"], "*fp32"),
    **dict.fromkeys(["by_entropy_ptr", "masked_ptr"], "*u8"),
    "rule_ptr": "*i8",
}  # numbers are i32


def compile_kernel(kernel, constants: dict[str, object], **types: str) -> None:
    signature = {name: types.get(name) or TYPES.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=TARGET)
    print(kernel.__name__, *types.values(), constants, f"{len(compiled.asm['cubin'])} bytes", flush=True)


def main() -> None:
    cases = list(itertools.product(["*fp32", "*bf16", "*fp16"], [False, True], [False, True]))
    for dtype, has_temperature, has_entropy in cases if TEST_ALL else covering(cases):
        constants = {"HAS_TEMPERATURE": has_temperature, "HAS_ENTROPY": has_entropy, "TILE_V": 4096}
        if not has_temperature:
            constants |= {"temperature_ptr": None, "noise_key_ptr": None}
        if not has_entropy:
            constants["by_entropy_ptr"] = None
        compile_kernel(confidence_kernel._confidence_kernel, constants, logits_ptr=dtype)
    for block_length, num_ends in [(1, 0), (32, 8), (128, 1)] if TEST_ALL else [(32, 8)]:
        compile_kernel(unmask_kernel._unmask_kernel, {"NUM_ENDS": num_ends, "PADDED_LENGTH": block_length})


if __name__ == "__main__":
    main()
