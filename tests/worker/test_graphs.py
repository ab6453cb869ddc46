"""The input of a graph: every array of a step has a place of its own, padded to the graph's size."""

import pytest
from vllm.config.compilation import CUDAGraphMode

from vllm_osdt.worker.graphs import Ends, GraphShapes, StepDescriptor, layout_of
from vllm_osdt.worker.transfer import ALIGNMENT

SHAPES = GraphShapes(
    block_length=8, num_end_tokens=2, padding_cell=99, padding_slot=4, is_block_causal=False, can_edit=False
)


def graph(**changes):
    return StepDescriptor(
        **{"cg_mode": CUDAGraphMode.FULL, "num_tokens": 32, "num_reqs": 4, "num_queries": 4, "num_logits": 16} | changes
    )


@pytest.mark.parametrize("ends", Ends)
@pytest.mark.parametrize("kind", [{}, {"is_block_causal": True}, {"is_block_causal": True, "commits_causally": True}])
def test_places_do_not_overlap(ends, kind):
    layout = layout_of(graph(ends=ends, num_queries=8), SHAPES._replace(can_edit=True, **kind))
    assert ("block_causal" in layout.fields) == ("commits_causally" in kind)
    ends_at = 0
    for name, field in layout.fields.items():
        size = 1
        for length in field.shape:
            size *= length
        assert layout.offsets[name] >= ends_at and layout.offsets[name] % ALIGNMENT == 0
        ends_at = layout.offsets[name] + size * field.dtype().itemsize
    assert layout.num_bytes >= ends_at


@pytest.mark.parametrize(
    ("ends", "can_edit", "expected"),
    [
        (Ends.DECIDED, True, False),
        (Ends.EDITED, True, True),
        (Ends.PROPOSED, True, True),  # a request of the step may edit beside one whose policy adjusts the step
        (Ends.PROPOSED, False, False),
    ],
)
def test_thresholds_of_edits_are_padded_wherever_a_step_may_edit(ends, can_edit, expected):
    layout = layout_of(graph(ends=ends), SHAPES._replace(can_edit=can_edit))
    assert ("edit_threshold" in layout.fields) == expected
    if expected:
        assert layout.fields["edit_threshold"].shape == (4,)
