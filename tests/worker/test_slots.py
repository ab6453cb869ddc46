"""What a slot holds of a request, and what its steps count."""

from types import SimpleNamespace

import numpy as np
import torch
from vllm import SamplingParams

from tests.calibration.records import flat
from vllm_osdt.calibration.profile import Setting
from vllm_osdt.geometry import Canvas, DecodeShape
from vllm_osdt.messages import Assignment, RequestSpec
from vllm_osdt.models.traits import Traits
from vllm_osdt.options import DecodingOptions
from vllm_osdt.policies import POLICIES
from vllm_osdt.worker.slots import ADJUSTING, CanvasStates
from vllm_osdt.worker.step.layout import plan_step
from vllm_osdt.worker.step.rows import step_rows

LENGTH, PROMPT = 4, [5, 6, 7]


def make_states():
    return CanvasStates(4, 32, Traits(LENGTH, 99), torch.device("cpu"))


def fill(states, slot, req_id, profile=None, chosen=None, draft=None, **options):
    """Give a slot to a request of two blocks."""
    options = DecodingOptions(**{"block_length": LENGTH, "gen_length": 2 * LENGTH, "statistic": "q1"} | options)
    canvas = Canvas(len(PROMPT), len(PROMPT) + 2 * LENGTH, len(PROMPT) + 2 * LENGTH, LENGTH)
    setting = Setting(options.granularity, options.statistic, options.record, options.risk)
    thresholds = None if profile is None else profile.thresholds(setting)
    schedule = POLICIES[options.policy].schedule(options, DecodeShape(2, LENGTH), thresholds)
    new = SimpleNamespace(
        req_id=req_id,
        sampling_params=SamplingParams(temperature=0.0),
        prefill_token_ids=PROMPT,
        prompt_token_ids=PROMPT,
    )
    assignment = Assignment(schedule, policy=chosen, has_drafts=draft is not None)
    states.add_request(slot, new, RequestSpec(options, canvas, draft=draft), assignment)


def step(states, slot, block=0):
    """Plan one denoising step of a request."""
    slots = np.array([slot])
    first, num_drafts = np.array([len(PROMPT) + block * LENGTH]), np.array([LENGTH], dtype=np.int32)
    return plan_step(states, step_rows(states, slots, first, np.array([LENGTH]), num_drafts, np.array([False])))


def counted(states):
    """Steps by kind of fallback since the last call."""
    found = states.take_fallbacks()
    return None if found is None else found.tolist()


def test_fallbacks_are_counted_by_denoising_step_and_told_once():
    states, profile = make_states(), flat(0.5)  # one block, one step
    fill(states, 0, "a", profile, granularity="step_block")
    for block in (0, 0, 0, 1):
        step(states, 0, block)
    assert counted(states) == [1, 1, 2, 0]  # none, block, step, cell
    states.remove_request("a")  # preempted: its slot is another's before it comes back
    fill(states, 0, "b", profile, granularity="block")
    step(states, 0)
    fill(states, 1, "a", profile, granularity="step_block")
    for _ in range(2):
        step(states, 1, 1)
    assert counted(states) == [1, 2, 0, 0]
    assert counted(states) is None


def test_cells_without_a_threshold_are_counted_too():
    states = make_states()
    fill(states, 0, "a", flat(0.5, num_requests=32), statistic="conformal", risk=0.01)
    for _ in range(3):
        step(states, 0)
    assert counted(states) == [0, 0, 0, 3]


def test_a_slot_keeps_no_draft_of_the_request_before():
    states = make_states()
    fill(states, 0, "a", draft=[8, 9, 10])
    assert states.drafts[3:6].tolist() == [8, 9, 10] and states.drafts[6:].max() == -1
    fill(states, 1, "b")
    assert np.isfinite(states.host.draft_threshold).tolist() == [True, False, False, False]
    states.remove_request("a")
    fill(states, 0, "c", draft=[11])
    states.write_draft(0, 5, [12, -1])
    assert states.drafts[:32][states.drafts[:32] >= 0].tolist() == [11, 12]


def test_a_slot_holds_prompt_and_masks_and_is_empty_when_it_is_free():
    states = make_states()
    fill(states, 2, "a", threshold=0.5, policy="static_threshold")
    assert states.token_ids[2, : len(PROMPT) + 2 * LENGTH].tolist() == [*PROMPT, *[99] * 2 * LENGTH]
    assert (states.host.parameters[2, : 2 * LENGTH] == 0.5).all() and states.host.block_length[2] == LENGTH
    states.remove_request("a")
    states.remove_request("a")  # ended after it was preempted
    assert states.host.block_length[2] == states.host.canvas_end[2] == 0


def test_a_policy_that_the_profile_has_chosen_adjusts_the_steps():
    states = make_states()
    for slot, (chosen, place) in enumerate(((None, 0), ("bacd", 1 + ADJUSTING.index(POLICIES["bacd"])), ("factor", 0))):
        fill(states, slot, str(slot), chosen=chosen)
        assert states.host.adjusts[slot] == place


def asks(states, left, num_steps=1):
    """Whether slot 0 goes on, in a step that follows ``num_steps`` more and has ``left`` masks."""
    for _ in range(num_steps):
        step(states, 0)
    states.host.masked[0, :LENGTH] = np.arange(LENGTH) < left
    return states.goes_on(np.array([0]), np.array([LENGTH]))


def test_a_block_goes_on_if_it_has_more_masks_than_its_last_step_removed():
    states = make_states()
    fill(states, 0, "a")
    assert not asks(states, LENGTH)  # its first step
    assert asks(states, 3)  # one removed, three left
    assert not asks(states, 1)  # two removed, one left
    fill(states, 0, "b")
    assert not asks(states, 2, num_steps=2)  # two removed by its first step, two left
    assert asks(states, 1, num_steps=2)  # half a position a step


def test_a_request_that_is_looked_at_is_asked_step_by_step():
    states = make_states()
    fill(states, 0, "a")
    assert not asks(states, LENGTH)
    for table in (states.host.is_recorded, states.host.reports_confidence, states.host.sub_block_length):
        table[0] = 1
        assert not asks(states, 3)
        table[0] = 0
    assert asks(states, 3)
    assert not states.goes_on(np.array([0]), np.array([0]))  # it denoises nothing


def test_most_blocks_of_a_step_must_go_on():
    states = make_states()
    for slot in range(4):
        fill(states, slot, str(slot))
        step(states, slot)
        step(states, slot)
    slots, num_active = np.arange(4), np.full(4, LENGTH)
    for number, expected in ((4, True), (3, True), (2, False)):
        states._seen[:] = -1
        states.host.masked[:4, :LENGTH] = np.arange(LENGTH) < np.where(slots < number, 3, 1)[:, None]
        assert states.goes_on(slots, num_active) == expected


def test_what_a_policy_keeps_outlasts_a_preemption_before_another_step():
    states = make_states()
    fill(states, 0, "a", policy="cad_llm")
    step(states, 0)
    states._carry_at_entry[0] = 7.0  # with which its block began
    for slot in (1, 2):  # it comes back, and loses its slot again before its block has a step
        states.remove_request("a")
        fill(states, slot, "a", policy="cad_llm")
        assert states.policy_carry[slot].tolist() == [7.0] * states.policy_carry.shape[1]
