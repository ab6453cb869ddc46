"""The offline decoder and OSDT's calibration on a small random model."""

from dataclasses import replace

import pytest
import torch

from examples.mini.evaluate import ONE_PER_STEP, Score, block_logits, calibrate, decode, osdt_rule, static_rule
from examples.mini.model import MiniConfig, MiniLLaDA, beside_clean_blocks, block_causal
from tests.reference.block_causal import ReferenceSDAR, decode_block_causal
from tests.reference.decode import static_threshold
from vllm_osdt.mini.tasks import generate

CONFIG = MiniConfig(vocab_size=256, eos_token_id=0, mask_token_id=1, block_length=8, n_layers=1)
CANVAS_LENGTH = 24


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = MiniLLaDA(CONFIG)
    model.initialize()
    # The end token never wins, so every block is decoded; the mask token always would.
    head = model.model["transformer"].ff_out.weight.data
    head[CONFIG.eos_token_id] = 0.0
    head[CONFIG.mask_token_id] *= 100.0
    return model.eval()


@pytest.fixture
def prompts():
    return torch.randint(3, 256, (4, 10), generator=torch.Generator().manual_seed(1))


def test_one_token_per_step_takes_a_forward_per_position(model, prompts):
    canvases, nfe = decode(model, prompts, static_rule(ONE_PER_STEP), CANVAS_LENGTH)
    assert nfe.tolist() == [CANVAS_LENGTH] * 4
    assert not (canvases == CONFIG.mask_token_id).any()


def test_threshold_zero_takes_a_forward_per_block(model, prompts):
    _, nfe = decode(model, prompts, static_rule(0.0), CANVAS_LENGTH)
    assert nfe.tolist() == [CANVAS_LENGTH // CONFIG.block_length] * 4


def test_the_dual_cache_computes_what_two_passes_with_kept_keys_and_values_do(model, prompts):
    """With one layer, what a row sees depends on the ids alone: masks instead of the active block's tokens are gone."""
    length, start = prompts.shape[1] + CANVAS_LENGTH, prompts.shape[1]
    entered = torch.cat((prompts, prompts.new_full((4, CANVAS_LENGTH), CONFIG.mask_token_id)), dim=1)
    now = entered.clone()
    now[:, start : start + 3] = 7
    active = slice(start, start + CONFIG.block_length)
    expected = model(now)[:, active]
    assert torch.allclose(block_logits(model, now, entered, active, "dual"), expected, atol=1e-5)
    assert torch.allclose(block_logits(model, now, entered, active, "prefix"), expected, atol=1e-5)
    assert torch.equal(block_logits(model, now, entered, active, "none"), expected)
    changed = entered.clone()
    changed[:, length - 1] = 9
    assert not torch.allclose(block_logits(model, now, changed, active, "dual"), expected, atol=1e-5)
    assert torch.allclose(block_logits(model, now, changed, active, "prefix"), expected, atol=1e-5)


def test_a_request_decodes_the_same_alone_and_in_a_batch(model, prompts):
    together, _ = decode(model, prompts, static_rule(0.05), CANVAS_LENGTH)
    alone = torch.cat([decode(model, row[None], static_rule(0.05), CANVAS_LENGTH)[0] for row in prompts])
    assert torch.equal(together, alone)


def test_decoding_stops_after_the_block_with_the_end_token(model, prompts):
    ending = MiniLLaDA(CONFIG)
    ending.load_state_dict(model.state_dict())
    ending.model["transformer"].ff_out.weight.data.zero_()  # all tokens tie, the lowest id is the end
    canvases, nfe = decode(ending.eval(), prompts, static_rule(0.0), CANVAS_LENGTH)
    assert nfe.tolist() == [1] * 4
    assert (canvases[:, CONFIG.block_length :] == CONFIG.mask_token_id).all()


def test_calibration_takes_the_lower_quartile_of_all_masked_positions_by_block(model):
    problem = generate("code", "held_out", 1, 0)[0]
    table = calibrate(model, problem, CANVAS_LENGTH)
    assert len(table) == CANVAS_LENGTH // CONFIG.block_length
    assert all(0.0 < threshold < 1.0 for threshold in table)


def test_osdt_caps_loosens_and_reuses_the_last_block():
    rule = osdt_rule([0.99, 0.5])
    confidence = torch.tensor([0.44, 0.46, 0.80, 0.82])
    assert rule(confidence, 0).tolist() == [False, False, False, True]
    assert rule(confidence, 1).tolist() == [False, True, True, True]
    assert rule(confidence, 7).tolist() == rule(confidence, 1).tolist()


def test_wilson_interval_of_a_perfect_score_is_not_a_point():
    low, high = Score(300, 300, 1.0).interval()
    assert 0.98 < low < 0.99
    assert high == pytest.approx(1.0)


@pytest.fixture(scope="module")
def block_causal_model():
    torch.manual_seed(0)
    model = MiniLLaDA(replace(CONFIG, family="sdar", n_layers=2))
    model.initialize()
    head = model.model["transformer"].ff_out.weight.data
    head[CONFIG.eos_token_id] = 0.0
    return model.eval()


def test_a_saved_block_causal_model_is_an_sdar_checkpoint(block_causal_model, tmp_path):
    block_causal_model.save(tmp_path)
    network = ReferenceSDAR.load(tmp_path)
    ids = torch.randint(3, 256, (21,), generator=torch.Generator().manual_seed(2))
    logits = block_causal_model(ids[None], visible=block_causal(torch.arange(21) // CONFIG.block_length))[0]
    torch.testing.assert_close(logits, network.forward(ids, CONFIG.block_length), rtol=1e-5, atol=1e-4)
    again = MiniLLaDA.load(tmp_path)
    assert again.config == block_causal_model.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), block_causal_model.parameters(), strict=True))


def test_noised_blocks_beside_clean_ones_are_computed_as_if_they_were_last(block_causal_model):
    block_length, start, length = CONFIG.block_length, 8, 24
    clean = torch.randint(3, 256, (2, length), generator=torch.Generator().manual_seed(3))
    states = clean[:, None, start:].clone().masked_fill(torch.rand(2, 1, length - start) < 0.5, CONFIG.mask_token_id)
    logits = block_causal_model(*beside_clean_blocks(states, clean, start, block_length))[:, length:]
    for block in range(start, length, block_length):
        ids = torch.cat((clean[:, :block], states[:, 0, block - start : block - start + block_length]), dim=1)
        visible = block_causal(torch.arange(ids.shape[1]) // block_length)
        expected = block_causal_model(ids, visible=visible)[:, block:]
        torch.testing.assert_close(logits[:, block - start :][:, :block_length], expected, rtol=1e-5, atol=1e-4)


def test_block_causal_decoding_equals_a_plain_loop(block_causal_model, prompts, tmp_path):
    block_causal_model.save(tmp_path)
    network = ReferenceSDAR.load(tmp_path)
    canvases, nfe = decode(block_causal_model, prompts, static_rule(0.05), CANVAS_LENGTH)
    assert canvases.shape[1] == 30  # 10 + 24 in whole blocks, without the prompt
    for row, prompt in enumerate(prompts.tolist()):
        expected = decode_block_causal(
            network, prompt, static_threshold(0.05), block_length=CONFIG.block_length, max_tokens=30
        )
        assert min(expected.proposal_margin, expected.rule_margin) > 1e-5
        assert (canvases[row].tolist(), int(nfe[row])) == (expected.tokens, expected.nfe)
