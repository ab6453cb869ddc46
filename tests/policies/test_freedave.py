"""FreeDave against its definition: the chain of right drafts, the next drafts, and answers with their forwards."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from csrc_triton.types import Blocks, Rule
from tests.e2e.engine import assert_idle, canvas_states, drive, generate, nfe, sampling, scheduler, submit, tokens
from tests.kernels.selection import TEST_ALL
from tests.reference.decode import best_first, calibrate, decode, fixed_steps, osdt, static_threshold
from tests.reference.llada import ReferenceLLaDA
from vllm_osdt.calibration.thresholds import Thresholds
from vllm_osdt.errors import InvalidOptionError
from vllm_osdt.geometry import DecodeShape
from vllm_osdt.mini import GEN_LENGTH, model_path
from vllm_osdt.mini.tasks import TASKS
from vllm_osdt.mini.tasks import generate as problems_of
from vllm_osdt.mini.tokenizer import build_tokenizer
from vllm_osdt.models.traits import Traits
from vllm_osdt.options import DecodingOptions
from vllm_osdt.options.family import validate_for_family
from vllm_osdt.options.parsing import parse_options
from vllm_osdt.policies import POLICIES
from vllm_osdt.worker.drafting import States, accept, draft, read_states
from vllm_osdt.worker.slots import CanvasStates
from vllm_osdt.worker.step.batch import DraftRows

MASK = None  # of a position in the plain states below
TOKENS = (5, 6, 7)


def chain_by_hand(drafts, targets, *, is_subset):
    """The published rule on lists: drafts[0] is the block itself; None where there is no draft."""
    chain = [0]
    while True:
        target, found = targets[chain[-1]], None
        for j in range(chain[-1] + 1, len(drafts)):
            if drafts[j] is None or MASK not in drafts[j]:
                continue
            pairs = list(zip(drafts[j], target, strict=True))
            if all(a == b for a, b in pairs) or (is_subset and all(a in (MASK, b) for a, b in pairs)):
                found = j
        if found is None:
            return chain
        chain.append(found)


@pytest.mark.parametrize("seed", range(60))
def test_the_chain_of_right_drafts_is_the_published_one(seed):
    rng = random.Random(seed)
    width, number, subsets = 4, 5, [False, True, False, True]
    drafts, targets = [], []
    for _ in subsets:
        states = [[MASK] * width]
        for _ in range(number - 1):  # each with one position more, so that chains are frequent
            state = list(states[-1])
            state[rng.randrange(width)] = rng.choice(TOKENS[:2])
            states.append(state)
        wanted = [
            list(states[min(i + 1, number - 1)]) if rng.random() < 0.7 else list(states[-1]) for i in range(number)
        ]
        drafts.append([None if i and rng.random() < 0.1 else state for i, state in enumerate(states)])
        targets.append(wanted)

    def as_states(rows):
        blank = [MASK] * width
        whole = [[blank if state is None else state for state in row] for row in rows]
        return States(
            torch.zeros(len(rows), number, dtype=torch.int64),
            torch.tensor([[state is not None for state in row] for row in drafts]),
            torch.tensor([[[token or 0 for token in state] for state in row] for row in whole], dtype=torch.int32),
            torch.tensor([[[token is MASK for token in state] for state in row] for row in whole]),
        )

    last, chain = accept(as_states(drafts), as_states(targets), torch.ones(4, number, width), torch.tensor(subsets))
    for row, is_subset in enumerate(subsets):
        expected = chain_by_hand(drafts[row], targets[row], is_subset=is_subset)
        assert last[row] == expected[-1] and chain[row].nonzero().ravel().tolist() == expected


@pytest.mark.parametrize("seed", range(10))
def test_a_draft_has_the_most_confident_positions_of_so_many_steps_more(seed):
    generator, width, length = torch.Generator().manual_seed(seed), 8, 7
    states = CanvasStates(4, 32, Traits(8, 99), torch.device("cpu"))
    states.branch_masked[:] = True  # of a longer block that was there before
    slots, accepted, sizes = torch.tensor([2, 0]), torch.tensor([1, 0]), torch.tensor([[1, 2, 1, 1, 2, 1, 1]] * 2)
    rows = DraftRows(
        torch.zeros(2, 3, dtype=torch.int64), slots, sizes, torch.zeros(2, dtype=torch.bool), slots.numpy()
    )
    ids = torch.randint(0, 50, (2, width), generator=generator, dtype=torch.int32)
    masked = torch.rand(2, width, generator=generator) < 0.7
    masked[:, length:] = False
    proposal = torch.randint(50, 90, (2, width), generator=generator)
    confidence = torch.randint(0, 4, (2, width), generator=generator) / 4.0  # equal ones are frequent
    confidence = confidence.masked_fill(~masked, -2.0)
    draft(states, rows, ids, masked, proposal, confidence, accepted)
    for row, slot in enumerate(slots.tolist()):
        left = {i: confidence[row, i].item() for i in range(width) if masked[row, i]}
        ranking = best_first(left)
        for k in range(3):  # seven sizes for three branches of this step and three further ones of the next
            first = int(accepted[row]) + 1
            number = int(sizes[row, first : first + k + 1].sum())
            filled = ranking[:number]
            expected = [int(proposal[row, i]) if i in filled else int(ids[row, i]) for i in range(width)]
            assert states.branch_ids[slot, k, :width].tolist() == expected
            still = [i for i in ranking if i not in filled] if number < len(ranking) else []
            assert states.branch_masked[slot, k].nonzero().ravel().tolist() == sorted(still)


def test_branches_are_read_where_they_are_written():
    states = CanvasStates(2, 16, Traits(4, 99), torch.device("cpu"))
    states.token_ids[1, :4] = torch.tensor([1, 2, 3, 4])
    states.branch_ids[1, 1, :4] = torch.tensor([5, 6, 7, 8])
    states.branch_masked[1, 1, 2] = states.masked[1, 3] = True
    of_branch = states.padding_cell + 1 + (1 * states.branch_ids.shape[1] + 1) * states.branch_ids.shape[2]
    index = torch.stack([16 + torch.arange(4), of_branch + torch.arange(4)])
    mask_rows = torch.tensor([1, states.idle_row + 1 + states.branch_ids.shape[1] + 1])
    blocks = Blocks(states.cells, states.masked, mask_rows, index, torch.empty(2, 0), torch.full((2,), 4))
    slots, none = torch.tensor([1]), torch.zeros(1, 4, dtype=torch.int64)
    found = read_states(DraftRows(torch.tensor([[0, 1]]), slots, none, none[:, 0] > 0, slots.numpy()), blocks)
    assert found.tokens.tolist() == [[[1, 2, 3, 4], [5, 6, 7, 8]]]
    assert found.masked.long().tolist() == [[[0, 0, 0, 1], [0, 0, 1, 0]]]


class PlainBlock:
    """A block of a canvas behind its refresh, and the cached rows around it: what the network makes of its states."""

    def __init__(self, network, ids, first, last, kept):
        self.network, self.ids, self.first, self.last = network, ids, first, last
        self.rest = [(torch.cat([k[:first], k[last:]]), torch.cat([v[:first], v[last:]])) for k, v in kept]

    def logits(self, state):
        """Of a state: token ids, None for masked."""
        mask = self.network.mask_token_id
        ids = torch.tensor([mask if token is None else token for token in state])
        return self.network.forward(ids, torch.arange(self.first, self.last), self.rest)[0]


def predict(network, logits, state):
    """Proposals and confidences of a state's masked positions."""
    probability = logits.double().softmax(dim=-1)
    logits = logits.clone()
    logits[:, network.mask_token_id] = -torch.inf
    proposal = logits.argmax(dim=-1).tolist()
    return proposal, {i: probability[i, proposal[i]].item() for i, token in enumerate(state) if token is None}


def filled(state, proposal, chosen):
    """A state with some positions more."""
    return [proposal[i] if i in chosen else token for i, token in enumerate(state)]


def cut_margin(masked, number):
    """How far the last of the most confident positions is from the next."""
    ranking = best_first(masked)
    return masked[ranking[number - 1]] - masked[ranking[number]] if 0 < number < len(ranking) else float("inf")


def freedave(network, prompt, gen_length, length, number, rule, sizes, *, is_subset=False):
    """The authors' loop with ``dual``.

    Args:
        rule: ``rule(block, step, masked)``: what a step of the base decoder unmasks.

    Returns:
        Tokens, forward passes, and the smallest margin by which a position was chosen.
    """
    ids, num_forwards, margin = list(prompt), 0, float("inf")
    for index, first in enumerate(range(len(prompt), len(prompt) + gen_length, length)):
        whole = torch.tensor(ids + [network.mask_token_id] * (len(prompt) + gen_length - len(ids)))
        logits, kept = network.forward(whole)
        block = PlainBlock(network, ids, first, first + length, kept)
        state, step = [None] * length, 0
        num_forwards += 1
        proposal, masked = predict(network, logits[first : first + length], state)
        while True:
            certain = filled(state, proposal, rule(index, step, masked))
            if None not in certain:
                break
            step += 1
            left = {i: masked[i] for i, token in enumerate(certain) if token is None}
            ranking, drafts, total = best_first(left), [certain], 0
            for k in range(1, number):
                total += sizes[min(step + k - 1, length - 1)]
                if total >= len(ranking):
                    break
                margin = min(margin, cut_margin(left, total))
                drafts.append(filled(certain, proposal, ranking[:total]))
            num_forwards += 1
            seen = [predict(network, block.logits(one), one) for one in drafts]
            targets = [filled(one, seen[k][0], rule(index, step + k, seen[k][1])) for k, one in enumerate(drafts)]
            margin = min([margin, *(cut_margin(m, sizes[min(step + k, length - 1)]) for k, (_, m) in enumerate(seen))])
            last = chain_by_hand(drafts, targets, is_subset=is_subset)[-1]
            state, step, (proposal, masked) = drafts[last], step + last, seen[last]
        ids += certain
    return ids[len(prompt) :], num_forwards, margin


@pytest.fixture(scope="module")
def prompts(golden_tasks):
    return [case["prompt_token_ids"] for case in golden_tasks.cases[:16]]


@pytest.mark.e2e
@pytest.mark.parametrize(("steps", "number"), [(16, 8), (6, 4)])
def test_an_engine_has_the_tokens_of_fixed_steps_in_as_many_forwards_as_the_plain_loop(
    random_llm, golden_random, steps, number
):
    network, canvas = ReferenceLLaDA.load(golden_random.folder), {"gen_length": 32, "block_length": 16}
    prompts = [case["prompt_token_ids"] for case in golden_random.cases[:16]]
    rule = fixed_steps(steps, 16)
    shares = [16 // steps + (i < 16 % steps) for i in range(steps)] + [1] * (16 - steps)
    base = [decode(network, prompt, rule, cache_mode="dual", **canvas) for prompt in prompts]
    plain = [freedave(network, prompt, 32, 16, number, rule, shares) for prompt in prompts]
    clear = [i for i, one in enumerate(base) if min(one.proposal_margin, plain[i][2]) > 1e-6]
    assert len(clear) >= 12
    assert [plain[i][0] for i in clear] == [base[i].tokens for i in clear]
    params = sampling(32, policy="freedave", freedave_drafts=number, steps_per_block=steps, cache_mode="dual", **canvas)
    got = generate(random_llm, prompts, params)
    assert [list(got[i].token_ids) for i in clear] == [base[i].tokens for i in clear]
    assert [nfe(got[i]) for i in clear] == [plain[i][1] for i in clear]
    assert sum(plain[i][1] for i in clear) < 0.9 * sum(base[i].nfe for i in clear)


@pytest.mark.e2e
@pytest.mark.parametrize("model", ["llada-mini", "sdar-mini"])
def test_answers_of_every_task_are_those_of_one_position_a_step(start_llm, model):
    """``TEST_ALL=1``: 200 held-out problems of each."""
    tokenizer, count = build_tokenizer(), 200 if TEST_ALL else 8
    llm = start_llm(Path(model_path(model)), max_num_seqs=64, max_model_len=256)
    prompts = [problem.prompt for task in TASKS for problem in problems_of(task, "held_out", count, 13)]
    token_ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    base, drafted = (
        generate(llm, token_ids, sampling(GEN_LENGTH, policy=policy, ignore_eos=False))
        for policy in ("fixed_steps", "freedave")
    )
    same = [list(one.token_ids) == list(other.token_ids) for one, other in zip(drafted, base, strict=True)]
    assert [prompt for prompt, is_same in zip(prompts, same, strict=True) if not is_same] == []
    assert sum(map(nfe, drafted)) < 0.7 * sum(map(nfe, base))


@pytest.mark.e2e
@pytest.mark.parametrize("accept", ["subset", "equal"])
def test_over_a_threshold_an_engine_takes_the_path_of_the_plain_loop(random_llm, golden_random, accept):
    network, canvas = ReferenceLLaDA.load(golden_random.folder), {"gen_length": 32, "block_length": 16}
    prompts, rule = [case["prompt_token_ids"] for case in golden_random.cases[:16]], static_threshold(0.4)
    options = {"threshold": 0.4, "cache_mode": "dual", **canvas}
    over = {"policy": "freedave", "freedave_base": "threshold", "freedave_accept": accept, **options}
    got = generate(random_llm, prompts, sampling(32, freedave_drafts=5, **over))
    plain = [freedave(network, prompt, 32, 16, 5, rule, [1] * 16, is_subset=accept == "subset") for prompt in prompts]
    clear = [i for i, one in enumerate(plain) if one[2] > 1e-6]
    assert rule.margin > 1e-7 and len(clear) >= 12
    assert [(list(got[i].token_ids), nfe(got[i])) for i in clear] == [plain[i][:2] for i in clear]
    static = generate(random_llm, prompts, sampling(32, policy="static_threshold", **options))
    assert sum(map(nfe, got)) < sum(map(nfe, static))
    if accept == "equal":
        assert [list(got[i].token_ids) for i in clear] == [list(static[i].token_ids) for i in clear]
        return
    alone = generate(random_llm, prompts, sampling(32, freedave_drafts=1, **over))
    assert tokens(alone) == tokens(static) and list(map(nfe, alone)) == list(map(nfe, static))


def test_each_state_has_the_profiles_threshold_of_its_block_and_step():
    asked = {"policy": "freedave", "calibrated": True, "freedave_base": "threshold", "task": "t", "statistic": "q1"}
    values = np.array([[0.5, 0.6], [0.7, 0.8]])
    thresholds = Thresholds(values, np.zeros((2, 2), dtype=np.int8))
    options = parse_options({**asked, "granularity": "step_block"}, base=DecodingOptions())
    found = POLICIES["freedave"].schedule(options, DecodeShape(2, 2), thresholds)
    np.testing.assert_allclose(found.parameters, values, rtol=1e-6)
    assert found.drafts.number == 8 and found.rule == Rule.THRESHOLD
    values = {"osdt_policy": "freedave", "osdt_calibrated": True, "osdt_task": "t"}
    with pytest.raises(InvalidOptionError, match="osdt_calibrated is True, which means nothing beside the other"):
        parse_options(values, base=DecodingOptions(), prefix="osdt_")


@pytest.mark.e2e
@pytest.mark.parametrize("accept", ["subset", "equal"])
def test_over_a_profiles_thresholds_an_engine_takes_the_path_of_the_plain_loop(tasks_llm, tasks_twin, prompts, accept):
    canvas = {"gen_length": 32, "block_length": 16, "cache_mode": "dual"}
    first = decode(tasks_twin, prompts[0], static_threshold(0.9), **canvas)
    rule = osdt(calibrate(first.record, "block", "q1", False), 1.0, 0.1)
    profile = {"task": f"drafted {accept}", "statistic": "q1", "threshold_cap": 1.0, "slack": 0.1}
    options = {**profile, "num_calibration_requests": 1, **canvas}
    over = {"policy": "freedave", "freedave_base": "threshold", "calibrated": True, "freedave_accept": accept}
    params = sampling(32, **over, **options)
    submit(tasks_llm, prompts[0], params)
    drafting: list[str] = []
    [calibrating] = drive(tasks_llm, lambda step: drafting.extend(scheduler(tasks_llm)._branchers)).values()
    assert list(calibrating.token_ids) == first.tokens and nfe(calibrating) == first.nfe  # the static threshold alone
    assert not drafting
    got = generate(tasks_llm, prompts, params)
    subset = accept == "subset"
    plain = [freedave(tasks_twin, prompt, 32, 16, 8, rule, [1] * 16, is_subset=subset) for prompt in prompts]
    clear = [i for i, one in enumerate(plain) if one[2] > 1e-6]
    assert len(clear) >= 12
    assert [(list(got[i].token_ids), nfe(got[i])) for i in clear] == [plain[i][:2] for i in clear]
    base = generate(tasks_llm, prompts, sampling(32, policy="osdt", **options))
    assert sum(map(nfe, got)) < sum(map(nfe, base))
    if accept == "equal":
        assert tokens(got) == tokens(base)


@pytest.mark.e2e
@pytest.mark.parametrize(
    "options",
    [
        {"cache_mode": "none"},
        {"cache_mode": "prefix", "temperature": 0.8, "seed": 3},
        {"refresh_interval": 2, "temperature": 0.8, "seed": 4},
        {"suffix_window": 1, "cache_mode": "prefix"},
        {"adablock": True, "adablock_threshold": 0.05, "adablock_delimiters": [5, 9, 20, 41]},
        {"temperature": 1.0, "seed": 5, "top_p": 0.9, "logit_bias": {7: 1.5}},
    ],
    ids=lambda options: ", ".join(options),
)
def test_tokens_are_those_of_fixed_steps_with_any_cache_and_sampling(tasks_llm, prompts, options):
    params = [
        sampling(40, policy=policy, block_length=16, return_trace=True, **options)
        for policy in ("fixed_steps", "freedave")
    ]
    # Beside requests of other policies, of which one reads logits and one has a grammar's kind of steps.
    others = [sampling(40, policy="klass", block_length=16), sampling(40, policy="bacd", logprobs=1, block_length=8)]
    company = generate(tasks_llm, prompts[:2] + prompts[:6], [*others, *[params[1]] * 6])
    base = generate(tasks_llm, prompts[:6], params[0])
    assert tokens(company[2:]) == tokens(base)
    assert sum(map(nfe, company[2:])) < sum(map(nfe, base))
    traces = [[dict(one.osdt["trace"]) for one in ones] for ones in (company[2:], base)]
    for trace in traces[0] + traces[1]:
        trace.pop("forward")
    for got, expected in zip(*traces, strict=True):
        assert got["step"] == expected["step"] and got["blocks"] == expected["blocks"]
        assert got["confidence"] == pytest.approx(expected["confidence"], abs=1e-6)
    alone = generate(tasks_llm, prompts[:2], others)
    assert tokens(company[:2]) == tokens(alone)


@pytest.mark.e2e
def test_drafts_give_their_pages_back_before_a_request_waits_and_when_it_ends(tasks_llm, prompts, monkeypatch):
    sched, params = scheduler(tasks_llm), sampling(64, policy="freedave", block_length=16)
    base = generate(tasks_llm, prompts[:3], sampling(64, policy="fixed_steps", block_length=16))
    allocate, refused, held = sched._allocate_slots, [], []

    def allocate_where_nobody_drafts(*args, **kwargs):
        if sched._pool._held:
            refused.append(1)
            return None
        return allocate(*args, **kwargs)

    monkeypatch.setattr(sched, "_allocate_slots", allocate_where_nobody_drafts)
    ids = [submit(tasks_llm, prompts[0], params)]

    def on_step(step):
        held.append(list(sched._pool._held))
        if step == 4:
            ids.extend(submit(tasks_llm, prompt, params) for prompt in prompts[1:3])
        if step == 9:
            assert sched.reset_prefix_cache(reset_running_requests=True) and not sched._pool._held

    finished = drive(tasks_llm, on_step)
    assert [list(finished[req_id].token_ids) for req_id in ids] == tokens(base)
    assert refused and held[4] and not sched._pool._held
    assert_idle(tasks_llm)


@pytest.mark.e2e
def test_nothing_is_taken_for_drafts_where_attention_cannot_compute_them(tasks_llm, prompts, monkeypatch):
    """What the worker finds out when it starts, and the engine core with the first step."""
    sched, asked = scheduler(tasks_llm), []
    monkeypatch.setattr(canvas_states(tasks_llm), "has_branches", False)
    monkeypatch.setattr(sched, "_has_branches", True)  # so that it is as it was in the end
    monkeypatch.setattr(sched._pool, "branches_that_fit", lambda *args: asked.append(args) or ())
    for base, own in (
        ({"policy": "fixed_steps"}, {}),
        ({"policy": "static_threshold", "threshold": 0.4}, {"freedave_base": "threshold", "threshold": 0.4}),
    ):
        expected = generate(tasks_llm, prompts[:3], sampling(40, block_length=16, **base))
        sched._has_branches = True
        got = generate(tasks_llm, prompts[:3], sampling(40, policy="freedave", block_length=16, **own))
        assert tokens(got) == tokens(expected) and list(map(nfe, got)) == list(map(nfe, expected))
        assert not sched._branchers and not sched._has_branches
    assert not asked


@pytest.fixture(scope="module")
def load_aware_llm(golden_random, start_llm):
    """Drafts give way from 16 rows of a step on, and are gone at 64."""
    own = {"profile_dir": "", "load_aware": {"low": 16, "high": 64}}
    return start_llm(golden_random.folder, max_num_seqs=32, max_model_len=512, additional_config={"osdt": own})


@pytest.fixture
def counted(load_aware_llm, monkeypatch):
    """Rows of each step so far on that engine: without drafts, of drafts, and how many requests denoise a block."""
    sched, steps = scheduler(load_aware_llm), []
    add = sched._add_spare_branches

    def counting(req_ids):
        add(req_ids)
        rows = [sched._rows[req_id] for req_id in req_ids]
        own, further = sum(one.num_rows for one in rows), sum(one.num_all_rows - one.num_rows for one in rows)
        steps.append((own, further, sum(one.num_rows == 16 for one in rows)))

    monkeypatch.setattr(sched, "_add_spare_branches", counting)
    return steps


@pytest.mark.e2e
def test_drafts_give_way_to_load_and_tokens_stay(load_aware_llm, random_llm, golden_random, counted):
    prompts = [case["prompt_token_ids"] for case in golden_random.cases[:8]]
    params = sampling(32, policy="freedave", freedave_drafts=4, block_length=16, cache_mode="dual")
    plain = generate(random_llm, prompts, sampling(32, policy="fixed_steps", block_length=16, cache_mode="dual"))
    drafted = generate(random_llm, prompts, params)
    forwards = {}
    for number in (1, 2, 3, 8):
        counted.clear()
        got = generate(load_aware_llm, prompts[:number], params)
        assert tokens(got) == tokens(plain[:number]) == tokens(drafted[:number])
        forwards[number] = sum(map(nfe, got)) / number
        of_blocks = [(own, further) for own, further, denoising in counted if own == 16 * denoising == 16 * number]
        assert set(of_blocks) == {(16 * number, 16 * max(4 - number, 0))}  # 64 rows a step, where they may be had
        assert all(own + further <= 64 for own, further, _ in counted if own < 64)
        assert all(not further for own, further, _ in counted if own >= 64)
    assert list(map(nfe, generate(load_aware_llm, prompts[:1], params))) == list(map(nfe, drafted[:1]))
    assert forwards[1] < forwards[2] < forwards[3] < forwards[8] == sum(map(nfe, plain)) / 8
    assert_idle(load_aware_llm)


@pytest.mark.e2e
def test_drafts_that_tokens_depend_on_do_not_give_way(load_aware_llm, random_llm, golden_random, counted):
    prompts = [case["prompt_token_ids"] for case in golden_random.cases[:8]]
    over = {"freedave_base": "threshold", "threshold": 0.4, "freedave_drafts": 5}
    params = sampling(32, policy="freedave", block_length=16, cache_mode="dual", **over)
    expected, got = (generate(llm, prompts, params) for llm in (random_llm, load_aware_llm))
    assert tokens(got) == tokens(expected) and list(map(nfe, got)) == list(map(nfe, expected))
    assert sum(further for own, further, _ in counted if own >= 64) > 0
    params = sampling(32, policy="freedave", block_length=16, cache_mode="dual", **{**over, "freedave_drafts": 2})
    assert tokens(generate(random_llm, prompts, params)) != tokens(expected)  # why


@pytest.mark.parametrize(
    ("name", "value", "traits"),
    [
        ("edit_threshold", 0.5, Traits(32, 99, can_edit=True)),
        ("refresh_confidence", 0.5, Traits(32, 99)),
        ("draft_ngram", 2, Traits(32, 99)),
        ("credit", True, Traits(32, 99)),
    ],
)
def test_what_belongs_to_one_state_of_a_block_is_refused(name, value, traits):
    options = parse_options({"policy": "freedave", name: value}, base=DecodingOptions())
    with pytest.raises(InvalidOptionError, match=rf"^{name} is .*policy 'freedave' computes several states") as error:
        validate_for_family(options, traits)
    assert error.value.parameter == name


def test_a_threshold_means_nothing_where_a_step_unmasks_a_number_of_positions():
    values, base = {"osdt_policy": "freedave", "osdt_threshold": 0.5}, DecodingOptions()
    with pytest.raises(InvalidOptionError, match="which means nothing beside"):
        parse_options(values, base=base, prefix="osdt_")
    with pytest.raises(InvalidOptionError, match="says nothing without osdt_freedave_base = 'threshold'"):
        parse_options({"osdt_policy": "freedave", "osdt_freedave_accept": "equal"}, base=base, prefix="osdt_")
    values["osdt_freedave_base"] = "threshold"
    assert parse_options(values, base=base, prefix="osdt_").threshold == 0.5


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"logprobs": 1}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"draft": [5, 6]}, "osdt_draft"),
    ],
)
def test_sampling_that_belongs_to_one_state_of_a_block_is_refused(tasks_llm, own, words):
    with pytest.raises(ValueError, match=f"^{words} cannot be sent with policy 'freedave'"):
        generate(tasks_llm, [[5, 6]], sampling(16, policy="freedave", **own))
