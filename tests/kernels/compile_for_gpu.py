"""Compiles every kernel for a GPU, which takes none: ``TRITON_INTERPRET=0 python tests/kernels/compile_for_gpu.py``.

Triton's interpreter runs what its compiler refuses (a global that is no constexpr, say), so the other tests here do not
show that a kernel compiles, nor in which order it adds. Prints a line per kernel. With ``TEST_ALL=1`` every
specialization is compiled.
"""

import itertools
import re

import triton
from selection import TEST_ALL, covering
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from csrc_triton import confidence_kernel, lm_head_kernel, partials_kernel, unmask_kernel

TARGET = GPUTarget("cuda", 90, 32)
MAX_SHARED_BYTES = 227 * 1024  # of a program on sm_90
TYPES = {
    **dict.fromkeys(["noise_key_ptr", "token_ptr", "slots_ptr", "canvas_index_ptr", "position_ptr"], "*i64"),
    **dict.fromkeys(["end_token_ids_ptr"], "*i64"),
    **dict.fromkeys(["cells_ptr", "num_output_positions_ptr", "min_unmask_ptr", "canvas_ptr", "counts_ptr"], "*i32"),
    **dict.fromkeys(
        ["temperature_ptr", "confidence_ptr", "margin_ptr", "parameter_ptr", "grid_ptr", "partials_ptr"], "*fp32"
    ),
    **dict.fromkeys(["by_entropy_ptr", "masked_ptr"], "*u8"),
    "rule_ptr": "*i8",
}  # numbers are i32
DTYPES, FLAGS = ["*fp32", "*bf16", "*fp16"], [False, True]
# To 16, as in every model of some size.
ALIGNED = ("logits_ptr", "logits_stride", "hidden_ptr", "hidden_stride", "weight_ptr", "weight_stride", "hidden_size")


def compile_kernel(kernel, constants: dict[str, object], options: dict[str, object] | None = None, **types: str):
    """Prints what was compiled; returns it."""
    signature = {name: types.get(name) or TYPES.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in ALIGNED}
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=TARGET, options=options)
    shared = compiled.metadata.shared
    assert shared <= MAX_SHARED_BYTES, f"{kernel.__name__} takes {shared} bytes of shared memory"
    size = f"{len(compiled.asm['cubin'])} bytes, {shared} shared"
    print(kernel.__name__, *types.values(), constants, size, flush=True)
    return compiled


def order_of_the_sum(compiled) -> str:
    """How the elements of the first sum of floats lie in threads, which is the order in which they are added."""
    ir = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ir, re.MULTILINE))
    operands = re.search(r'"tt\.reduce"[^{]*<{[^}]*}> \({[^}]*arith\.addf[^}]*}\) : \(([^)]*)\)', ir)
    assert operands, "no sum was found"
    return re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), operands[1])


def assert_one_order(orders: list[tuple[str, str]]) -> None:
    """Of a dtype's sums: a row must not depend on the variant that the other rows need."""
    for dtype in DTYPES:
        found = {order for other, order in orders if other == dtype}
        assert len(found) <= 1, f"{dtype}: sums of {len(found)} orders: {found}"


def cases(*axes: list) -> list[tuple]:
    every = list(itertools.product(*axes))
    return every if TEST_ALL else covering(every)


def row_options(has_temperature: bool, has_entropy: bool, has_margin: bool) -> dict[str, object]:
    constants: dict[str, object] = {"HAS_TEMPERATURE": has_temperature, "HAS_ENTROPY": has_entropy}
    constants["HAS_MARGIN"] = has_margin
    if not has_temperature:
        constants |= {"temperature_ptr": None, "noise_key_ptr": None}
    if not has_entropy:
        constants["by_entropy_ptr"] = None
    return constants


def main() -> None:
    unfused = {"enable_fp_fusion": False}
    orders: list[tuple[str, str]] = []
    for dtype, has_temperature, has_entropy, has_margin, is_one_chunk in cases(DTYPES, FLAGS, FLAGS, FLAGS, FLAGS):
        constants = row_options(has_temperature, has_entropy, has_margin)
        constants |= {"IS_ONE_CHUNK": is_one_chunk, "CHUNK_V": confidence_kernel.CHUNK_V}
        constants |= dict.fromkeys(["partials_ptr"] if is_one_chunk else ["token_ptr", "confidence_ptr"])
        if not (has_margin and is_one_chunk):
            constants["margin_ptr"] = None
        options = unfused | {"num_warps": 8}
        compiled = compile_kernel(confidence_kernel._confidence_kernel, constants, options, logits_ptr=dtype)
        orders.append((dtype, order_of_the_sum(compiled)))
    assert_one_order(orders)
    orders.clear()
    for has_entropy, has_margin, num_chunks in cases(FLAGS, FLAGS, [32, 512]):
        constants = row_options(False, has_entropy, has_margin)
        constants = {name: constants[name] for name in constants if "temperature" not in name.lower()}
        constants.pop("noise_key_ptr", None)
        if not has_margin:
            constants["margin_ptr"] = None
        compile_kernel(
            partials_kernel._combine_kernel,
            constants | {"PADDED_CHUNKS": num_chunks, "NUM_FIELDS_OF_CHUNK": 8},
            unfused,
        )
    few = [("*fp32", True, False, True), ("*bf16", True, True, True), ("*bf16", False, False, False)]  # seconds each
    every = itertools.product(DTYPES, FLAGS, FLAGS, FLAGS)
    for dtype, has_temperature, has_entropy, has_margin in every if TEST_ALL else few:
        tile_m, chunk_v, tile_h, num_warps, num_stages = lm_head_kernel.TILES[4 if dtype == "*fp32" else 2]
        constants = row_options(has_temperature, has_entropy, has_margin)
        constants |= {"TILE_M": tile_m, "CHUNK_V": chunk_v, "TILE_H": tile_h}
        options = unfused | {"num_warps": num_warps, "num_stages": num_stages}
        types = {"hidden_ptr": dtype, "weight_ptr": dtype}
        compiled = compile_kernel(lm_head_kernel._lm_head_kernel, constants, options, **types)
        orders.append((dtype, order_of_the_sum(compiled)))
        ptx = compiled.asm["ptx"]
        assert ("wgmma" in ptx) == (dtype != "*fp32"), f"tensor cores, {dtype}"
        assert "cp.async" in ptx, "the next tiles are not loaded ahead"
    assert_one_order(orders)
    for block_length, num_ends in [(1, 0), (32, 8), (128, 1)] if TEST_ALL else [(32, 8)]:
        compile_kernel(unmask_kernel._unmask_kernel, {"NUM_ENDS": num_ends, "PADDED_LENGTH": block_length})


if __name__ == "__main__":
    main()
