"""The denoising step of one batch: which rows run, which of them are read, and by which rule they are unmasked."""

from dataclasses import dataclass

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_osdt.worker.request_states import CanvasStates


@dataclass(frozen=True)
class DenoiseBatch:
    """What the sampler needs of a step; R requests, W the longest block among them, M masked positions.

    Attributes:
        slots_np: ``[R]`` slots, on the host.
        slots: The same on the device.
        num_rows: M; the logits may have a row more when nothing is masked.
        cells: int64 ``[M]``, index into ``[R, W]`` of each logits row.
        canvas_index: int64 ``[R, W]``, index into ``CanvasStates.cells``; padding points to the last cell.
        rule: int8 ``[R]``.
        parameter: float32 ``[R]``.
        eos_token_id: int64 ``[R]``, -1 for none.
        num_needed: int32 ``[R]``, leading positions of the block that the request still has to output.
        temperature: float32 ``[M]``, or None when all are 0.
        noise_key: int64 ``[M]``, or None likewise.
    """

    slots_np: np.ndarray
    slots: torch.Tensor
    num_rows: int
    cells: torch.Tensor
    canvas_index: torch.Tensor
    rule: torch.Tensor
    parameter: torch.Tensor
    eos_token_id: torch.Tensor
    num_needed: torch.Tensor
    temperature: torch.Tensor | None
    noise_key: torch.Tensor | None


@dataclass
class CanvasInputBatch(InputBatch):
    """vLLM's input batch with the denoising step it is for."""

    denoise: DenoiseBatch | None = None


def noise_keys(seed: np.ndarray, position: np.ndarray, step: np.ndarray) -> np.ndarray:
    """One random key per position and denoising step, so that sampling depends on nothing else.

    Args:
        seed, position, step: int64 ``[M]``; step counts from the block's first.

    Returns:
        int64 ``[M]``: two rounds of the splitmix64 finaliser.
    """
    with np.errstate(over="ignore"):
        key = seed.astype(np.uint64)
        for word in (position, step):
            key = (key ^ word.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            key ^= key >> np.uint64(31)
    return key.view(np.int64)


def plan_denoise(
    states: CanvasStates, slots: np.ndarray, first_row: np.ndarray, block_start: np.ndarray
) -> tuple[DenoiseBatch, np.ndarray, np.ndarray]:
    """Look up everything the step's sampler needs.

    Args:
        states: Tables, after ``begin_step``.
        slots: ``[R]`` scheduled slots.
        first_row: ``[R]`` batch row of each request's first active position.
        block_start: ``[R]`` position of it.

    Returns:
        The batch; ``[M]`` batch rows whose logits are read; ``[R]`` how many of them each request has.
    """
    device = states.device
    block_length = states.block_length_np[slots]
    num_reqs, width = slots.size, max(1, int(block_length.max()))
    masked = states.masked_np[slots, :width]  # [R, W]
    row_req, row_pos = np.nonzero(masked)
    positions = np.arange(width)

    max_model_len = states.max_model_len
    canvas_index = (slots * max_model_len + block_start)[:, None] + positions
    canvas_index[positions >= block_length[:, None]] = states.cells.numel() - 1

    step = states.step_np[slots]
    offset = np.minimum(block_start - states.prompt_len_np[slots] + step, max_model_len - 1)
    temperature = states.temperature_np[slots]
    row_temperature = row_keys = None
    if temperature.any():
        row_temperature = async_tensor_h2d(temperature[row_req], device=device)
        keys = noise_keys(states.seed_np[slots][row_req], block_start[row_req] + row_pos, step[row_req])
        row_keys = async_tensor_h2d(keys, device=device)
    num_needed = np.clip(states.output_end_np[slots] - block_start, 0, block_length).astype(np.int32)
    batch = DenoiseBatch(
        slots_np=slots,
        slots=async_tensor_h2d(slots, device=device),
        num_rows=row_req.size,
        cells=async_tensor_h2d(row_req * width + row_pos, device=device),
        canvas_index=async_tensor_h2d(canvas_index, device=device),
        rule=async_tensor_h2d(states.rule_np[slots], device=device),
        parameter=async_tensor_h2d(states.parameters_np[slots, offset], device=device),
        eos_token_id=async_tensor_h2d(states.eos_np[slots], device=device),
        num_needed=async_tensor_h2d(num_needed, device=device),
        temperature=row_temperature,
        noise_key=row_keys,
    )
    return batch, first_row[row_req] + row_pos, np.bincount(row_req, minlength=num_reqs)
