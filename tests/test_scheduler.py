"""Which rows the canvas scheduler plans, seen in the engine's scheduler outputs."""

import pytest

pytestmark = pytest.mark.e2e

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(autouse=True)
def one_by_one(monkeypatch):
    """The scheduler plans every step; the worker takes none behind another."""
    from vllm_osdt.worker.cpu_worker import CanvasModelRunner

    monkeypatch.setattr(CanvasModelRunner, "_keeps_rows", lambda self, batch: False)


@pytest.fixture
def planned(monkeypatch):
    """Runs requests on an engine; returns their completions and, for each step, the rows by request."""
    from tests.e2e.engine import drive, scheduler, submit

    def run(llm, requests):
        sched, steps = scheduler(llm), []
        schedule = sched.schedule

        def recording(*args, **kwargs):
            output = schedule(*args, **kwargs)
            if output.num_scheduled_tokens:
                running = {request.request_id for request in sched.running}
                steps.append((dict(output.num_scheduled_tokens), running, dict(output.scheduled_spec_decode_tokens)))
            return output

        with monkeypatch.context() as patch:
            patch.setattr(sched, "schedule", recording)
            req_ids = [submit(llm, prompt, params) for prompt, params in requests]
            finished = drive(llm)
        return [finished[req_id] for req_id in req_ids], steps

    return run


def two_blocks(cache):
    """Two blocks of eight positions, four steps each."""
    from tests.e2e.engine import sampling

    return sampling(16, policy="fixed_steps", steps=8, block_length=8, cache_mode=cache)


@pytest.mark.parametrize(
    ("cache", "rows"),
    [
        ("none", [21] * 8),
        ("prefix", [21, 16, 16, 16, 21, 8, 8, 8]),
        ("dual", [21, 8, 8, 8, 21, 8, 8, 8]),
    ],
)
def test_each_block_starts_with_a_refresh_and_goes_on_as_its_cache_says(tasks_llm, planned, cache, rows):
    [completion], steps = planned(tasks_llm, [(PROMPT, two_blocks(cache))])
    assert [sum(step.values()) for step, _, _ in steps] == rows
    assert len(completion.token_ids) == 16


def test_placeholders_are_the_rows_from_the_active_block_on(tasks_llm, planned):
    _, steps = planned(tasks_llm, [(PROMPT, two_blocks("dual"))])
    assert [len(next(iter(drafts.values()))) for _, _, drafts in steps] == [16, 8, 8, 8, 8, 8, 8, 8]


def test_a_preempted_request_starts_its_block_again_with_a_refresh(tasks_llm, monkeypatch):
    from tests.e2e.engine import drive, scheduler, submit

    sched, rows = scheduler(tasks_llm), []
    schedule = sched.schedule

    def recording(*args, **kwargs):
        output = schedule(*args, **kwargs)
        rows.extend(output.num_scheduled_tokens.values())
        return output

    monkeypatch.setattr(sched, "schedule", recording)
    submit(tasks_llm, PROMPT, two_blocks("dual"))
    drive(tasks_llm, lambda step: step == 6 and sched.reset_prefix_cache(reset_running_requests=True))
    assert rows == [21, 8, 8, 8, 21, 8, 21, 8, 8, 8]


@pytest.fixture
def crowded(narrow_llm, golden_tasks, planned):
    """Sixteen canvases of which one refresh fills most of a step of 200 rows; their prompts, parameters, outcome."""
    from tests.e2e.engine import sampling

    prompts = [case["prompt_token_ids"] for case in golden_tasks.cases[:16]]
    # Blocks take several steps at first and one at the end, when every step of every request is a refresh.
    params = sampling(128, policy="static_threshold", threshold=0.95, block_length=8, cache_mode="dual")
    return prompts, params, *planned(narrow_llm, [(prompt, params) for prompt in prompts])


def test_rows_of_a_request_are_never_split(crowded, narrow_llm):
    from tests.e2e.engine import generate, tokens

    prompts, params, completions, steps = crowded
    refresh = {len(prompt) + 128 for prompt in prompts}
    assert all(sum(rows.values()) <= 200 for rows, _, _ in steps)
    assert {count for rows, _, _ in steps for count in rows.values()} <= refresh | {8}
    assert sum(len(running) - len(rows.keys() & running) for rows, running, _ in steps) > 100  # many were postponed
    assert tokens(completions) == [tokens(generate(narrow_llm, [prompt], params))[0] for prompt in prompts]


def test_postponed_requests_take_turns(crowded):
    _, _, _, steps = crowded
    waited, longest = {}, 0
    for rows, running, _ in steps:
        for req_id in running:
            waited[req_id] = 0 if req_id in rows else waited.get(req_id, 0) + 1
        longest = max(longest, *waited.values())
    # At least one request runs in every step; nobody runs twice while another waits.
    assert longest < max(len(running) for _, running, _ in steps)
