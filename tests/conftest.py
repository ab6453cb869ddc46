"""Settings and engines shared by the tests. Imports neither torch nor vLLM before a fixture asks for them."""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Read by vLLM while it is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# Data-parallel ranks of vLLM 0.33 on a CPU want a memory node each unless this is set; 0 simulates none.
os.environ.setdefault("VLLM_CPU_SIM_MULTI_NUMA", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The models are tiny: threads that spin for each other cost more than they bring on a shared machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Profiles are kept in the user's data folder by default: not in that of whoever runs the tests.
DATA_FOLDER = tempfile.TemporaryDirectory(prefix="vllm-osdt-tests-", ignore_cleanup_errors=True)
os.environ["XDG_DATA_HOME"] = DATA_FOLDER.name

REPOSITORY = Path(__file__).resolve().parents[1]
GOLDEN = REPOSITORY / "tests" / "golden"
# Pages of an engine in this process. 64 requests of 512 tokens take 192 MiB in the largest of these models, and vLLM
# writes to every page at the start.
KV_CACHE_BYTES = 2**28


@dataclass(frozen=True)
class Golden:
    """A recorded checkpoint: its folder and what the stock decoder did with it."""

    folder: Path
    cases: list[dict[str, Any]]

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's ``config.json``."""
        return json.loads((self.folder / "config.json").read_text())


def load_golden(name: str) -> Golden:
    """A recorded checkpoint of ``tests/golden``; a recording that is not there is a failure."""
    folder = GOLDEN / name
    return Golden(folder, json.loads((folder / "cases.json").read_text()))


@pytest.fixture(scope="session")
def golden_random() -> Golden:
    """Random weights, 24 cases."""
    return load_golden("llada_random")


@pytest.fixture(scope="session")
def golden_dream() -> Golden:
    """Dream, random weights, 24 cases."""
    return load_golden("dream_random")


@pytest.fixture(scope="session")
def golden_llada2() -> Golden:
    """LLaDA2, random weights, 30 cases, half of them with token editing."""
    return load_golden("llada2_random")


@pytest.fixture(scope="session")
def golden_fast_dllm_v2() -> Golden:
    """Fast-dLLM v2, random weights, 30 cases."""
    return load_golden("fast_dllm_v2_random")


@pytest.fixture(scope="session")
def golden_sdar() -> Golden:
    """SDAR, random weights, 30 cases, with and without a threshold."""
    return load_golden("sdar_random")


@pytest.fixture(scope="session")
def golden_tasks() -> Golden:
    """A small model trained on toy tasks, 60 cases."""
    return load_golden("llada_tasks")


def save_word_tokenizer(golden: Golden, folder: Path) -> None:
    """Save a word tokenizer of a recorded checkpoint's vocabulary in the form vLLM loads; nameless ids become <id>."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    named = golden.folder / "vocab.json"
    words = {token_id: word for word, token_id in json.loads(named.read_text()).items()} if named.exists() else {}
    words = {token_id: words.get(token_id, f"<{token_id}>") for token_id in range(golden.config["vocab_size"])}
    eos, mask = (words[golden.config[name]] for name in ("eos_token_id", "mask_token_id"))
    tokenizer = Tokenizer(WordLevel({word: token_id for token_id, word in words.items()}, unk_token=eos))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, mask_token=mask, unk_token=eos).save_pretrained(
        folder
    )


FRAGMENTS = (
    '{" ": ", "} [" "] :" tr ue true fa al se false nu ll null in am me na name id ag ge age '
    "yes no ab cd 12 34 00 -1 .5 e1"
)


def save_text_tokenizer(golden: Golden, folder: Path) -> None:
    """Save a tokenizer of a recorded checkpoint's vocabulary that can write JSON.

    Printable ASCII, as many fragments of JSON as there are ids, and words in angle brackets for what is left.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    named = {golden.config["eos_token_id"]: "<|eos|>", golden.config["mask_token_id"]: "<|mask|>"}
    texts = [*map(chr, range(33, 127)), "\u0120", "\u010a"]  # a space and a line feed
    merges = []
    for word in FRAGMENTS.split():
        for split in range(1, len(word)):
            if word not in texts and word[:split] in texts and word[split:] in texts:
                merges.append((word[:split], word[split:]))
                texts.append(word)
    free = (token_id for token_id in range(golden.config["vocab_size"]) if token_id not in named)
    words = {word: token_id for token_id, word in named.items()} | dict(zip(texts, free, strict=False))
    words |= {f"<{token_id}>": token_id for token_id in free}
    tokenizer = Tokenizer(BPE(words, [pair for pair in merges if "".join(pair) in words]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    eos, mask = (named[golden.config[name]] for name in ("eos_token_id", "mask_token_id"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, mask_token=mask).save_pretrained(folder)


@pytest.fixture(scope="session")
def tasks_tokenizer(golden_tasks: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task model's tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_word_tokenizer(golden_tasks, folder)
    return folder


@pytest.fixture(scope="session")
def start_llm() -> Any:
    """Starts an engine in this process, with what the tests have in common.

    Engines share vLLM's process groups, which the first one to be collected takes down: they live to the end.
    """
    from vllm import LLM

    engines = []

    def start(model: Path, **arguments: Any) -> Any:
        # Engines of one model would find each other's profiles on disk.
        arguments.setdefault("additional_config", {"osdt": {"profile_dir": ""}})
        arguments = {
            "dtype": "float32",
            "skip_tokenizer_init": "tokenizer" not in arguments,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            **arguments,
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # whole GiB, and stronger than the argument
            engines.append(LLM(model=str(model), **arguments))
        return engines[-1]

    return start


@pytest.fixture(scope="session")
def tasks_llm(golden_tasks: Golden, tasks_tokenizer: Path, start_llm: Any) -> Any:
    """The task model with room for everything; statistics are on, as in a server."""
    return start_llm(
        golden_tasks.folder,
        tokenizer=str(tasks_tokenizer),
        max_num_seqs=64,
        max_model_len=256,
        disable_log_stats=False,
    )


@pytest.fixture(scope="session")
def random_llm(golden_random: Golden, start_llm: Any) -> Any:
    """The random model with room for everything."""
    return start_llm(golden_random.folder, max_num_seqs=32, max_model_len=512)


@pytest.fixture(scope="session")
def narrow_llm(golden_tasks: Golden, start_llm: Any) -> Any:
    """The task model where few requests fit one forward pass, and not every canvas that the model allows."""
    return start_llm(golden_tasks.folder, max_num_seqs=64, max_model_len=256, max_num_batched_tokens=200)


@pytest.fixture(scope="session")
def tasks_twin(golden_tasks: Golden) -> Any:
    """The task model in plain PyTorch."""
    from tests.reference.llada import ReferenceLLaDA

    return ReferenceLLaDA.load(golden_tasks.folder)
