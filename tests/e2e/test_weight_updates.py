"""Weights that change while an engine serves: nothing of the old ones is used, and responses say which they had."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

import vllm_osdt
from tests.e2e.engine import assert_idle, drive, generate, registry, sampling, scheduler, submit, tokens
from tests.e2e.trained import train
from vllm_osdt.mini import model_path
from vllm_osdt.mini.tasks import generate as problems_of

pytestmark = pytest.mark.e2e

MAX_TOKENS = 64
ONE_SHOT = {"task": "code", "num_calibration_requests": 1, "statistic": "q1"}
BLOCK_LENGTH = 8
UNCALIBRATED = {"policy": "fixed_steps", "steps": MAX_TOKENS // 2, "block_length": BLOCK_LENGTH}


class FolderEngine(WeightTransferEngine):
    """A backend of vLLM's weight transfer that gets its weights from a folder, in two parts."""

    init_info_cls = WeightTransferInitInfo
    update_info_cls = WeightTransferUpdateInfo

    def init_transfer_engine(self, init_info: Any) -> None:
        pass

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        weights = list(load_file(Path(update_info["folder"]) / "model.safetensors").items())
        self.model.load_weights(weights[update_info["part"] :: 2])

    def receive_weights(self, update_info: Any) -> None:
        raise NotImplementedError

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


def by_rpc(llm: Any, folder: Path) -> None:
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})


def by_function(llm: Any, folder: Path) -> None:
    llm.collective_rpc(lambda worker: worker.model_runner.reload_weights(weights_path=str(folder)))


def by_transfer(llm: Any, folder: Path) -> None:
    llm.start_weight_update()
    for part in range(2):
        llm.update_weights({"update_info": {"folder": str(folder), "part": part}})
    llm.finish_weight_update(weight_version=folder.name)


def in_process(llm: Any, folder: Path) -> None:
    """As trainers do that share their process with the engine, past all that the engine core sees."""
    llm.llm_engine.model_executor.driver_worker.model_runner.reload_weights(weights_path=str(folder))


@pytest.fixture(scope="module")
def new_weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of a bundled model's checkpoint with other weights."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("trained") / f"new-{name}"
        shutil.copytree(model_path(name), folder)
        train(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def start(start_llm):
    if "folder" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("folder", FolderEngine)
    arguments = {
        "max_num_seqs": 16,
        "max_num_batched_tokens": 2048,
        "block_size": 32,  # a page is shorter than the prompts
        "weight_transfer_config": {"backend": "folder"},
    }
    return lambda folder, **more: start_llm(folder, tokenizer=str(folder), **arguments, **more)


@pytest.fixture(scope="module")
def sdar(start):
    return start(model_path("sdar-mini"))


@pytest.fixture(scope="module")
def profile_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module")
def llada(start, profile_folder):
    return start(model_path("llada-mini"), additional_config={"osdt": {"profile_dir": str(profile_folder)}})


@pytest.fixture(scope="module")
def sdar_folders(new_weights):
    """The old and the new weights."""
    return Path(model_path("sdar-mini")), new_weights("sdar-mini")


@pytest.fixture(scope="module")
def llada_folders(new_weights):
    """The old and the new weights."""
    return Path(model_path("llada-mini")), new_weights("llada-mini")


def prompts_of(llm: Any, number: int) -> list[list[int]]:
    """Prompts that begin alike, for more than a page."""
    first, *others = [problem.prompt for problem in problems_of("code", "held_out", number + 1, seed=3)]
    return [llm.get_tokenizer().encode(first + other) for other in others]


def two_batches(llm: Any) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Calibrate a task and decode prompts with its profile: tokens, and what is said of each request.

    The first prompt comes twice, so that its pages are in the prefix cache.
    """
    prompts, params = prompts_of(llm, 6), sampling(MAX_TOKENS, ignore_eos=False, **ONE_SHOT)
    outputs = []
    for batch in (prompts[:1], prompts):
        outputs += llm.generate([{"prompt_token_ids": prompt} for prompt in batch], params, use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    if llm.llm_engine.model_config.hf_config.traits.is_block_causal:
        assert [output.num_cached_tokens > 0 for output in outputs[:2]] == [False, True]
    about = [vllm_osdt.describe(completion) for completion in completions]
    assert about[0]["calibrating"]
    assert len({one["profile"] for one in about[1:]}) == 1 and about[1]["profile"] is not None
    return tokens(completions), about


@pytest.fixture(scope="module")
def expected(start, sdar_folders):
    """Two batches of an engine that has never had other weights than the new ones."""
    return two_batches(start(sdar_folders[1]))


def versions(about: list[dict[str, Any]]) -> set[tuple[Any, Any]]:
    return {(one["weights_version_at_start"], one["weights_version"]) for one in about}


def without_versions(about: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in one.items() if not name.startswith("weights")} for one in about]


@pytest.mark.parametrize("update", [by_rpc, by_function, by_transfer, in_process])
def test_after_an_update_an_engine_is_as_one_that_began_with_the_weights(sdar, expected, sdar_folders, update):
    old, new = sdar_folders
    expected_tokens, expected_about = expected
    by_rpc(sdar, old)
    first = scheduler(sdar)._weights.num_updates
    before, before_about = two_batches(sdar)
    update(sdar, new)
    after, after_about = two_batches(sdar)
    update(sdar, old)
    again, again_about = two_batches(sdar)
    assert after == expected_tokens and again == before
    assert sum(x != y for x, y in zip(after, before, strict=True)) >= 6  # the weights do matter
    names = [old.name, new.name] if update is by_transfer else [first + 2, first + 1]
    assert versions(before_about) == {(first, first)}
    assert versions(after_about) == {(names[1], names[1])} and versions(again_about) == {(names[0], names[0])}
    assert scheduler(sdar)._weights.num_updates == first + 2
    assert without_versions(after_about) == without_versions(expected_about)
    assert without_versions(again_about) == without_versions(before_about)
    assert_idle(sdar)


@pytest.fixture(scope="module", params=["llada", "sdar"])
def kept(request):
    """An engine of either attention, its old and its new weights."""
    return request.getfixturevalue(request.param), *request.getfixturevalue(f"{request.param}_folders")


def decode_with_update(
    llm: Any, prompt: list[int], params: Any, num_blocks: int, update: Callable[[], None]
) -> tuple[Any, int]:
    """A request's completion, and how many tokens it had when the weights changed: right after so many blocks."""
    core, req_id, num_old = llm.llm_engine.engine_core.engine_core, submit(llm, prompt, params), None

    def on_step(step: int) -> None:
        nonlocal num_old
        requests = list(scheduler(llm).requests.values())
        has_begun = step >= 1 and requests and requests[0].num_output_tokens >= num_blocks * BLOCK_LENGTH
        if num_old is None and has_begun:
            num_old = requests[0].num_output_tokens
            core.pause_scheduler("keep", clear_cache=False)
            update()
            core.resume_scheduler()

    finished = drive(llm, on_step)
    assert num_old is not None
    return finished[req_id], num_old


@pytest.mark.parametrize("update", [by_rpc, in_process])
@pytest.mark.parametrize("num_blocks", [0, 2])
def test_a_kept_request_goes_on_as_if_its_tokens_were_a_prompt(kept, update, num_blocks):
    llm, old, new = kept
    by_rpc(llm, old)
    first = scheduler(llm)._weights.num_updates
    [prompt], params = prompts_of(llm, 1), sampling(MAX_TOKENS, **UNCALIBRATED)
    prompt = prompt[len(prompt) % BLOCK_LENGTH :]  # whole blocks, so that they are the same in the continuation
    completion, num_old = decode_with_update(llm, prompt, params, num_blocks, lambda: update(llm, new))
    about, found = vllm_osdt.describe(completion), list(completion.token_ids)
    [whole] = tokens(generate(llm, [prompt], params))
    rest = sampling(MAX_TOKENS - num_old, **{**UNCALIBRATED, "steps": (MAX_TOKENS - num_old) // 2})
    [continued] = tokens(generate(llm, [prompt + found[:num_old]], rest))
    by_rpc(llm, old)
    [before] = tokens(generate(llm, [prompt], params))
    assert found == before[:num_old] + continued
    assert before != whole and len(found) == MAX_TOKENS
    assert (num_old > 0) == (num_blocks > 0) and num_old < MAX_TOKENS
    assert about["weights_version"] == first + 1
    assert about["weights_version_at_start"] == (first if num_old else first + 1)


@pytest.mark.parametrize("num_blocks", [0, 2])
def test_a_calibration_that_an_update_meets_makes_no_profile_of_two_weights(sdar, sdar_folders, num_blocks):
    old, new = sdar_folders
    by_rpc(sdar, old)
    prompt, params = prompts_of(sdar, 1)[0], sampling(MAX_TOKENS, **ONE_SHOT)
    completion, num_old = decode_with_update(sdar, prompt, params, num_blocks, lambda: by_rpc(sdar, new))
    assert vllm_osdt.describe(completion)["calibrating"] == (num_old == 0)  # it begins again
    assert len(registry(sdar).profiles) == (num_old == 0) and registry(sdar).num_calibrating == 0


def test_a_profile_is_of_the_files_that_the_weights_come_from(llada, llada_folders, profile_folder):
    old, new = llada_folders

    def used(**options: Any) -> set[tuple[str | None, bool]]:
        completions = generate(llada, prompts_of(llada, 2), sampling(MAX_TOKENS, **ONE_SHOT, **options))
        return {(one["profile"], one["calibrating"]) for one in map(vllm_osdt.describe, completions)}

    by_rpc(llada, old)
    _, about = two_batches(llada)
    profiles = {old: about[-1]["profile"]}
    assert used(profile=profiles[old]) == {(profiles[old], False)}
    by_rpc(llada, new)
    _, about = two_batches(llada)
    profiles[new] = about[-1]["profile"]
    assert profiles[old] != profiles[new]
    for folder in (old, new):
        by_rpc(llada, folder)
        assert used() == {(profiles[folder], False)}
    assert used(profile=profiles[old]) == {(None, False)}
    files = sorted(profile_folder.rglob("*.json"))
    model = llada.llm_engine.model_executor.driver_worker.model_runner.model
    model.load_weights([("model.transformer.ln_f.weight", 0.9 * model.model.norm.weight.data)])
    assert used() == {(None, True), (None, False)}  # one calibrates, the other comes meanwhile
    [(made, is_calibrating)] = used()
    assert made not in (None, *profiles.values()) and not is_calibrating
    assert sorted(profile_folder.rglob("*.json")) == files


def test_what_leaves_the_weights_alone_leaves_profiles_alone(sdar, sdar_folders):
    by_rpc(sdar, sdar_folders[0])
    _, about = two_batches(sdar)
    sdar.collective_rpc(lambda worker: worker.get_model())
    assert sdar.collective_rpc("held_weights")[0].num_updates == about[-1]["weights_version"]
    sdar.reset_prefix_cache()
    [completion] = generate(sdar, prompts_of(sdar, 1), sampling(MAX_TOKENS, **ONE_SHOT))
    assert vllm_osdt.describe(completion)["profile"] == about[-1]["profile"]
    assert vllm_osdt.describe(completion)["weights_version"] == about[-1]["weights_version"]


def test_a_label_names_the_weights_until_the_next_update(sdar, sdar_folders):
    [prompt], params = prompts_of(sdar, 1), sampling(MAX_TOKENS, **UNCALIBRATED)

    def ask() -> int | str:
        return vllm_osdt.describe(generate(sdar, [prompt], params)[0])["weights_version"]

    before = scheduler(sdar)._weights.num_updates
    sdar.update_weight_version("step 40")
    assert ask() == "step 40"
    in_process(sdar, sdar_folders[0])
    sdar.update_weight_version("step 41")  # before the next step, which would see the update
    assert ask() == "step 41" and sdar.get_weight_version() == "step 41"
    by_rpc(sdar, sdar_folders[0])
    assert ask() == before + 2
