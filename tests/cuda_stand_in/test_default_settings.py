"""Engines of the bundled models with default settings: attention by FlashAttention, in bfloat16."""

from collections import Counter
from types import SimpleNamespace

import pytest

import vllm_osdt
from tests.cuda_stand_in.cuda import LEDGER
from tests.e2e.engine import assert_idle, drive, generate, scheduler, submit, tokens
from vllm_osdt.geometry import MAX_BLOCK_LENGTH
from vllm_osdt.mini import model_path

# Copies to the device of a step that takes in no request, whatever its policies, without vLLM's own: of page tables
# that grow, which it reads from mapped memory.
# The second is of a step that is launched ahead behind the first.
MAX_COPIES_PER_STEP = 2
PAGE_TABLES = "gpu/buffer_utils.py"
# Copies to the host of a step that records nothing: tokens, their numbers, masks, and, where another step was launched
# behind it, whether that was of use.
MAX_COPIES_BACK = 4
WAITS_FOR_OUTPUT = "async_utils.py"  # vLLM's, the one wait of a step
OTHER_LENGTHS = (1, 4, 16, 24, 96)  # of blocks, besides the served one
OTHER_POLICIES = ("fixed_steps", "factor", "joint_bound", "entropy_bound", "local_leap", "bacd")


@pytest.fixture(scope="module")
def started(mini, start_llm):
    """An engine, what was launched while it started, and the rows that its memory profile sampled."""
    from vllm_osdt.worker.sampler import CanvasSampler

    profiled, call = [], CanvasSampler.__call__

    def watched(self, logits, input_batch, *others):
        if getattr(input_batch, "denoise", None) is None:
            profiled.append(logits.shape[0])
        return call(self, logits, input_batch, *others)

    LEDGER.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CanvasSampler, "__call__", watched)
        llm = start_llm(
            model_path(mini),
            dtype="auto",
            tokenizer=model_path(mini),
            kv_cache_memory_bytes=None,
            compilation_config={},
        )
    return SimpleNamespace(llm=llm, launches=Counter(LEDGER.launches), profiled=profiled)


@pytest.fixture
def llm(started):
    LEDGER.clear()
    return started.llm


@pytest.fixture
def problems(cpu_tokens, mini):
    return cpu_tokens["models"][mini]


def prompts_of(llm, problems):
    return [llm.get_tokenizer().encode(problem["prompt"]) for problem in problems]


def params(**options):
    return vllm_osdt.sampling_params(**{"max_tokens": 32, "policy": "static_threshold", **options})


def watch_steps(llm, note=lambda: None):
    """Run the engine to its end. Returns copies to the device, copies to the host, and waits of each step.

    ``note`` is called before the ledger begins anew, also before the first step.
    """
    steps = []

    def on_step(step):
        note()
        ours = [line for line in LEDGER.event_waits if WAITS_FOR_OUTPUT not in line]
        assert not ours, ours
        steps.append((LEDGER.to_device.copy(), LEDGER.to_host.copy(), LEDGER.waits.copy()))
        LEDGER.clear()

    LEDGER.clear()
    drive(llm, on_step)
    return steps[1:]  # the first call is before the first step


def num_copies(to_device):
    """Copies to the device but vLLM's of page tables."""
    return sum(number for line, number in to_device.items() if PAGE_TABLES not in line)


def test_the_engine_runs_on_the_gpu_worker(llm):
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert type(worker).__module__ == "vllm_osdt.worker.gpu_worker"
    config = llm.llm_engine.vllm_config
    assert not config.model_config.enforce_eager
    assert {group.backend.get_name() for groups in worker.model_runner.attn_groups for group in groups} == {
        "FLASH_ATTN"
    }


def test_the_memory_profile_samples_as_many_rows_as_a_step_can_read(started):
    scheduler_config = started.llm.llm_engine.vllm_config.scheduler_config
    most = min(scheduler_config.max_num_batched_tokens, scheduler_config.max_num_seqs * MAX_BLOCK_LENGTH)
    assert max(started.profiled) == most >= 8192


def test_problems_are_decoded_as_on_a_cpu(llm, problems, cpu_tokens):
    completions = generate(llm, prompts_of(llm, problems), params(max_tokens=cpu_tokens["max_tokens"], threshold=0.9))
    assert tokens(completions) == [problem["tokens"] for problem in problems]


def test_a_step_neither_waits_nor_copies_more_than_it_may(llm, problems):
    block_length = 8
    for prompt in prompts_of(llm, problems)[:3]:
        options = {"policy": "fixed_steps", "steps_per_block": 8, "block_length": block_length}
        submit(llm, prompt, params(**options, max_tokens=block_length, ignore_eos=True))
    steps = watch_steps(llm)
    assert len(steps) >= 4
    for to_device, to_host, waits in steps[1:]:  # the first takes the requests in
        assert num_copies(to_device) <= MAX_COPIES_PER_STEP, to_device
        assert to_host.total() <= MAX_COPIES_BACK, to_host
        assert not waits


def test_policies_and_temperatures_and_recording_add_neither_waits_nor_copies(llm, problems):
    prompts = prompts_of(llm, problems)
    for prompt, policy in zip(prompts, OTHER_POLICIES, strict=False):
        submit(llm, prompt, params(policy=policy, temperature=0.5, seed=1, ignore_eos=True))
    submit(llm, prompts[-1], params(task="waits", policy="osdt", statistic="q1", num_calibration_requests=1))
    for step, (to_device, _, waits) in enumerate(watch_steps(llm)):
        assert not waits
        assert step == 0 or num_copies(to_device) <= MAX_COPIES_PER_STEP, to_device


def test_no_kernel_is_compiled_by_a_request(started, llm, problems, mini):
    prompts = prompts_of(llm, problems)
    for policy in ("static_threshold", *OTHER_POLICIES):
        for temperature in (0.0, 0.7):
            for number in (1, 3):
                generate(llm, prompts[:number], params(policy=policy, temperature=temperature, max_tokens=16))
    if mini == "llada-mini":  # the other's blocks have one length
        for length in OTHER_LENGTHS:
            generate(llm, prompts[:2], params(block_length=length, max_tokens=length))
    new = [launch for launch in LEDGER.launches if launch not in started.launches]
    differences = [
        [argument for argument in launch if argument not in other]
        for launch in new
        for other in started.launches
        if other[0] == launch[0]
    ]
    assert not new, ([launch[0] for launch in new], differences)


def test_osdt_calibrates_and_uses_its_profile(llm, problems):
    options = {"policy": "osdt", "task": "letters", "statistic": "q1", "num_calibration_requests": 1}
    prompts = prompts_of(llm, problems)
    [first] = generate(llm, prompts[:1], params(**options))
    assert vllm_osdt.describe(first)["calibrating"]
    later = [vllm_osdt.describe(one) for one in generate(llm, prompts[:3], params(**options))]
    assert all(one["profile"] is not None and not one["calibrating"] for one in later)
    assert len({one["profile"] for one in later}) == 1


def test_a_sample_depends_on_its_seed_alone(llm, problems):
    prompt, *others = prompts_of(llm, problems)
    sampled = [params(temperature=2.0, seed=seed, policy="fixed_steps", steps_per_block=2) for seed in range(6)]
    alone = [tokens(generate(llm, [prompt], one))[0] for one in sampled]
    beside = generate(llm, [prompt] * 6 + others[:2], [*sampled, *sampled[:2]])
    assert tokens(beside[:6]) == alone
    assert any(one != alone[0] for one in alone)


def test_an_aborted_request_leaves_nothing_behind(llm, problems):
    options = params(policy="fixed_steps", ignore_eos=True)
    req_ids = [submit(llm, prompt, options) for prompt in prompts_of(llm, problems)[:3]]

    def abort(step):
        if step == 2:
            llm.llm_engine.abort_request(req_ids[:1])

    finished = drive(llm, abort)
    assert {*finished} == {*req_ids[1:]}
    assert_idle(llm)


def test_a_preempted_request_decodes_the_same_tokens(llm, problems, cpu_tokens):
    options = params(max_tokens=cpu_tokens["max_tokens"], threshold=0.9)
    req_ids = [submit(llm, prompt, options) for prompt in prompts_of(llm, problems)]
    num_preempted = 0

    def preempt(step):
        nonlocal num_preempted
        if step in (1, 3):
            num_preempted += len(scheduler(llm).running)
            scheduler(llm).reset_prefix_cache(reset_running_requests=True)

    finished = drive(llm, preempt)
    assert num_preempted
    assert [list(finished[req_id].token_ids) for req_id in req_ids] == [problem["tokens"] for problem in problems]
