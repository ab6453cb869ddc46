"""What a canvas model adds to vLLM's own model of its architecture.

Attention is vLLM's too: the model state tells it what a query sees (``worker.model_state``).
"""

from typing import Any

import torch


class CanvasMixin:
    """Put before vLLM's model class: the model state of a canvas, and hidden states of the rows that are read."""

    @staticmethod
    def get_model_state_cls() -> type:
        """vLLM's hook for the model state of Model Runner V2."""
        from vllm_osdt.worker.model_state import CanvasModelState

        return CanvasModelState

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        logit_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states of all rows, or of ``logit_rows`` (int64 ``[M]``) in their order."""
        hidden_states = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)  # type: ignore[misc]
        return hidden_states if logit_rows is None else hidden_states[logit_rows]
