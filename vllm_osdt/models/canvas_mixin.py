"""What a canvas model adds to vLLM's own model of its architecture.

Attention is vLLM's too: the model state tells it what a query sees (``worker.model_state``).
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from vllm.utils.import_utils import resolve_obj_by_qualname

MODEL_STATE = "vllm_osdt.worker.model_state.CanvasModelState"  # by name: models know nothing of workers
LOADER_LOG = "vllm.model_executor.models.utils"


def _is_no_rounding(record: logging.LogRecord) -> bool:
    """False for vLLM's warning that a weight is rounded to the dtype it is served in, one line for every weight."""
    return not str(record.msg).startswith("Attempted to load weight")


class CanvasMixin:
    """Put before vLLM's model class: the model state of a canvas, and hidden states of the rows that are read.

    Attributes:
        num_loads: Rises when ``load_weights`` begins and when it ends, whoever calls it (``worker.weights``).
    """

    num_loads = 0

    @staticmethod
    def get_model_state_cls() -> type:
        """vLLM's hook for the model state of Model Runner V2."""
        return resolve_obj_by_qualname(MODEL_STATE)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As vLLM does, without a line for every weight of a float32 checkpoint that is served in another dtype."""
        self.num_loads += 1
        logger = logging.getLogger(LOADER_LOG)
        logger.addFilter(_is_no_rounding)
        try:
            return super().load_weights(weights)  # type: ignore[misc]
        finally:
            self.num_loads += 1
            logger.removeFilter(_is_no_rounding)

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
