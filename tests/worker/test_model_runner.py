"""The runner looks at the attention that vLLM has chosen in the end."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_osdt.errors import OSDTError
from vllm_osdt.worker.model_runner import CanvasRunnerMixin


class Stock:
    """Stands for vLLM's runner, which chooses attention when it gets its pages."""

    def __init__(self, backend: str) -> None:
        self._backend = SimpleNamespace(get_name=lambda: backend)

    def initialize_kv_cache(self) -> None:
        self.attn_groups = [[SimpleNamespace(backend=self._backend)]]


class Runner(CanvasRunnerMixin, Stock):
    def __init__(self, backend: str, *, is_block_causal: bool, commits_causally: bool = False) -> None:
        super().__init__(backend)
        states = SimpleNamespace(is_block_causal=is_block_causal, commits_causally=commits_causally)
        self.model_state = SimpleNamespace(canvas_states=states)


@pytest.mark.parametrize("backend", ["FLASHINFER", "FLEX_ATTENTION"])
def test_attention_without_room_for_blocks_stops_the_engine_at_start(backend):
    with pytest.raises(OSDTError, match=f"attention backend {backend} holds as many requests"):
        Runner(backend, is_block_causal=True).initialize_kv_cache()


def test_attention_whose_kernels_without_a_mask_have_faults_stops_the_engine_at_start():
    with pytest.raises(OSDTError, match="attention backend FLASHINFER is passed over by vLLM itself"):
        Runner("FLASHINFER", is_block_causal=False).initialize_kv_cache()
    Runner("FLEX_ATTENTION", is_block_causal=False).initialize_kv_cache()


@pytest.mark.parametrize("version", [2, 3, 4])
def test_causal_commits_want_attention_that_takes_both_kinds_of_queries(monkeypatch, version):
    from vllm.v1.attention.backends import fa_utils

    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda: version)
    runner = Runner("FLASH_ATTN", is_block_causal=True, commits_causally=True)
    if version == 4:
        runner.initialize_kv_cache()
    else:
        with pytest.raises(OSDTError, match=rf"FLASH_ATTN \(FlashAttention {version}\) takes a step's queries as all"):
            runner.initialize_kv_cache()
    with pytest.raises(OSDTError, match="attention backend ROCM_ATTN takes a step's queries as all causal or none"):
        Runner("ROCM_ATTN", is_block_causal=True, commits_causally=True).initialize_kv_cache()
    Runner("TRITON_ATTN", is_block_causal=True, commits_causally=True).initialize_kv_cache()


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN"])
def test_other_attention_is_taken(backend):
    runner = Runner(backend, is_block_causal=True)
    runner.initialize_kv_cache()
    assert runner.attn_groups[0][0].backend.get_name() == backend


@pytest.mark.parametrize(("num_rows", "expected"), [(2, "proposals"), (3, None)])
def test_a_step_that_needs_logits_proposes_once_where_its_head_reads_them_too(num_rows, expected):
    def decide_by_logits(logits, batch, own, rows, compute):
        assert logits.shape[0] == rows.shape[0] == num_rows
        return own

    runner = SimpleNamespace(
        head=SimpleNamespace(writes_logits=lambda number: number > 2, propose=lambda hidden, batch: "proposals"),
        model=SimpleNamespace(compute_logits=lambda hidden: hidden),
        sampler=SimpleNamespace(decide_by_logits=decide_by_logits),
        _compute_some_logits=None,
    )
    position = torch.arange(num_rows)
    batch = SimpleNamespace(denoise=SimpleNamespace(needs_logits=True, position=position))
    assert CanvasRunnerMixin._decide_by_rows(runner, torch.zeros(5, 4), batch) == expected


NONE = np.empty(0, dtype=np.int64)


@pytest.mark.parametrize(
    ("prompt", "token", "num_logits", "padded_to", "expected"),
    [
        # Who reads no logits keeps the adapter of its own rows, however alike the others are.
        ((1, 2), (1, 1, 1, 2, 2), [3, 0], (32, 8), ((1, 1, 1), (1, 1, 1, 2, 2))),
        ((1, 0), (1, 1, 1, 0), [0, 1], (32, 8), ((0,), (1, 1, 1, 0))),
        ((1, 2), (1, 2), [1, 0], (32, 8), ((1,), (1, 2))),
        # One adapter for all: padding has it, too.
        ((2, 2), (2, 2, 2), [1, 0], (8, 4), ((2,) * 4, (2,) * 8)),
        ((2, 2), (2, 2, 2), [2, 1], None, ((2,) * 3, (2,) * 3)),
    ],
)
def test_every_row_has_the_adapter_of_its_request(prompt, token, num_logits, padded_to, expected):
    found = []

    class Stock:
        def _set_active_loras(self, prompt_lora_mapping, token_lora_mapping):
            found.append((tuple(prompt_lora_mapping), tuple(token_lora_mapping)))

    class Runner(CanvasRunnerMixin, Stock):
        pass

    runner = object.__new__(Runner)
    runner._num_logits, runner._further, runner._padded_to = np.array(num_logits), (NONE, NONE), padded_to
    runner._set_active_loras(prompt, token)
    assert found == [expected]
    runner._set_active_loras(prompt, token)  # of a step of vLLM's own, as it is
    assert found[1] == (prompt, token)
