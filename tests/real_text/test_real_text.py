"""The recipe on a tiny random Llama: what it trains on, how it decodes, what it writes."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from examples.real_text.adapt import LowRank, adapt, make_trainable, merge
from examples.real_text.base import make_tokenizer, nll, published_name, unpermute
from examples.real_text.decode import ONE_PER_STEP, decode
from examples.real_text.evaluate import AUTOREGRESSIVE, ONE, distinct, evaluate, passes_gate
from examples.real_text.export import apply_adapter, export, save_adapter
from examples.real_text.model import Config, Llama
from examples.real_text.prompts import TEMPLATE, collect
from examples.real_text.rows import CLEAN, loss_of, noise, sees
from tests.reference.block_causal import ReferenceFastDLLMv2, decode_fast_dllm_v2
from tests.reference.decode import ThresholdRule

MIN_MARGIN = 1e-4  # of choices that rounding does not turn
CONFIG = Config(
    vocab_size=101,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    max_position_embeddings=512,
)
EOS, MASK, BLOCK = CONFIG.eos_token_id, CONFIG.mask_token_id, CONFIG.block_length


def make_llama(seed=0):
    torch.manual_seed(seed)
    model = Llama(CONFIG).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight += 0.2 * torch.randn_like(weight)
        else:
            weight.normal_(std=(2.0 if "embed" in name else 1.0) * weight.shape[1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def llama():
    return make_llama()


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(17, 100, size=length).tolist() for length in (1, 7, 8, 9, 16, 23, 30, 5, 12, 40)]


def reference_of(model, folder):
    export(model, None, folder, torch.float32)
    return ReferenceFastDLLMv2.load(folder)


def plain(network, prompt, threshold, max_tokens=21):
    rule = ThresholdRule(lambda block, step: threshold, strict=True)
    blocks = {"block_length": BLOCK, "sub_block_length": BLOCK, "sub_block_cache": False}
    return decode_fast_dllm_v2(network, prompt, rule, max_tokens=max_tokens, end_token_ids=(EOS,), **blocks)


def test_unpermute_turns_neighbouring_pairs_of_a_head_into_its_halves():
    num_heads, head_size = 3, 8
    weight = torch.randn(num_heads * head_size, 5)
    halves = torch.arange(num_heads * head_size).view(num_heads, 2, head_size // 2)
    permuted = weight[halves.transpose(1, 2).flatten()]  # as a GGUF has it
    assert torch.equal(permuted[:2], weight[[0, head_size // 2]])
    assert torch.equal(unpermute(permuted, num_heads), weight)


def test_tensors_and_tokens_of_a_gguf_get_their_names():
    assert published_name("blk.12.attn_q.weight") == "model.layers.12.self_attn.q_proj.weight"
    assert published_name("output_norm.weight") == "model.norm.weight"
    tokens = ["<|end|>", *"ab123", "\u0120", "ab", "\u0120ab"]
    tokenizer = make_tokenizer(tokens, [3] + [1] * 8, ["a b", "\u0120 ab"])
    encoded = tokenizer.encode("ab ab12<|end|>")
    assert encoded.tokens == ["ab", "\u0120ab", "1", "2", "<|end|>"]
    assert tokenizer.decode(encoded.ids) == "ab ab12"


def test_prompts_are_of_the_users_file_and_of_docstrings_each_once(tmp_path, monkeypatch):
    text = "A sentence about nothing at all that is as long as a docstring has to be here."
    (tmp_path / "one.py").write_text(f'def f():\n    """{text}\n\n    More."""\n')
    (tmp_path / "two.py").write_text(f'"""{text}"""\nx = (')
    (tmp_path / "three.py").write_text(f'"""{text}"""\n')
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"purelib": str(tmp_path), "stdlib": str(tmp_path)})
    file = tmp_path / "own.jsonl"
    file.write_text('{"question": "Who?"}\n{"prompt": "Where?"}\n{"prompt": "Where?"}\n')
    prompts = collect(10, 0, file)
    assert len(prompts) == 3 and TEMPLATE.format("Who?") in prompts and TEMPLATE.format("Where?") in prompts
    assert sum(text in prompt and "More" not in prompt for prompt in prompts) == 1
    assert prompts == collect(10, 0, file) and len(collect(2, 0, file)) == 2


@pytest.mark.parametrize("num_prompt", [1, 5, 8, 15, 16])
@pytest.mark.parametrize("is_ended", [False, True])
@pytest.mark.parametrize("num_output", [9, 21, 24])
def test_every_output_token_is_predicted_once_from_the_row_before_it(num_prompt, num_output, is_ended):
    rng = np.random.default_rng(num_output)
    prompt, output = (rng.integers(17, 100, size=number).tolist() for number in (num_prompt, num_output))
    if is_ended:
        output[-1] = EOS
    text = noise(prompt, output, CONFIG, rng)
    whole = prompt + output + [EOS] * (-(num_prompt + num_output) % BLOCK)
    end = len(whole) if is_ended else (num_prompt + num_output) // BLOCK * BLOCK
    assert text.ids[text.copies == CLEAN].tolist() == whole[:end]
    predicted = text.positions[text.sources] + 1
    assert sorted(predicted) == list(range(num_prompt, end))
    assert text.targets.tolist() == [whole[position] for position in predicted]
    assert text.weights.tolist() == [1.0 if p < num_prompt + num_output else 0.2 for p in predicted]
    row_of = {key: row for row, key in enumerate(zip(text.positions, text.copies, strict=True))}
    for source, position in zip(text.sources, predicted, strict=True):
        is_first = position % BLOCK == 0
        assert (text.copies[source] == CLEAN) == is_first
        if not is_first:
            assert text.ids[row_of[position, text.copies[source]]] == MASK
    masked = text.ids == MASK
    assert masked.sum() == sum(position % BLOCK != 0 for position in predicted)
    for copy in (1, 2):  # whole blocks, each with a mask; the rest is as in the text
        of_copy = text.copies == copy
        assert all(row.any() for row in masked[of_copy].reshape(-1, BLOCK))
        assert all(text.ids[of_copy & ~masked] == np.array(whole)[text.positions[of_copy & ~masked]])


def test_rows_see_the_clean_blocks_before_them_and_their_own_block_in_their_own_copy():
    positions = torch.tensor([[*range(24), *range(8, 24), *range(16, 24), 0]])
    copies = torch.tensor([[*[0] * 24, *[1] * 16, *[2] * 8, -1]])
    visible = sees(positions, copies, BLOCK)[0]
    rows = list(zip(positions[0].tolist(), copies[0].tolist(), strict=True))
    for query, (position, copy) in enumerate(rows):
        if copy >= 0:
            expected = {(p, CLEAN) for p in range(position // BLOCK * BLOCK)}
            expected |= {(p, copy) for p in range(position // BLOCK * BLOCK, position // BLOCK * BLOCK + BLOCK)}
        else:
            expected = {(0, -1)}  # padding: itself
        assert {rows[key] for key in visible[query].nonzero()[:, 0].tolist()} == expected


def test_the_loss_is_that_of_what_decoding_sees(llama, tmp_path):
    """Every target from a forward pass of its own: the text before its block, then its block as the copy has it."""
    rng, network = np.random.default_rng(3), reference_of(llama, tmp_path)
    pairs = [
        (rng.integers(17, 100, size=9).tolist(), [*rng.integers(17, 100, size=number), EOS]) for number in (12, 25)
    ]
    texts = [noise(prompt, output, CONFIG, rng) for prompt, output in pairs]
    total = weight = 0.0
    for text in texts:
        clean = text.ids[text.copies == CLEAN]
        for source, target, share in zip(text.sources, text.targets, text.weights, strict=True):
            start = text.positions[source] // BLOCK * BLOCK
            block = text.ids[(text.copies == text.copies[source]) & (text.positions // BLOCK * BLOCK == start)]
            logits = network.forward(torch.from_numpy(np.concatenate((clean[:start], block))), BLOCK)
            total -= share * logits[text.positions[source]].log_softmax(-1)[target].item()
            weight += share
    assert loss_of(llama, texts).item() == pytest.approx(total / weight, rel=1e-4)


@pytest.mark.parametrize("threshold", [ONE_PER_STEP, 0.4, 0.15])
def test_a_batch_decodes_as_a_plain_loop_does(llama, prompts, tmp_path, threshold):
    network, num_clear = reference_of(llama, tmp_path), 0
    decoded = decode(llama, prompts, max_tokens=21, block_length=BLOCK, threshold=threshold)
    for prompt, got in zip(prompts, decoded, strict=True):
        expected = plain(network, prompt, threshold)
        if expected.proposal_margin > MIN_MARGIN and expected.rule_margin > MIN_MARGIN:
            num_clear += 1
            assert (got.tokens, got.nfe) == (expected.tokens, expected.nfe)
    assert num_clear >= 7


def test_blocks_of_one_token_are_autoregressive_and_nll_is_that_of_their_choices(llama, prompts):
    decoded = decode(llama, prompts[:4], max_tokens=6, block_length=1, end_token_id=-1)
    found = nll(llama, prompts[:4], [one.tokens for one in decoded], batch=3)
    for prompt, got, total in zip(prompts, decoded, found, strict=False):
        ids, expected = list(prompt), 0.0
        for _ in range(6):
            own = torch.arange(len(ids))
            hidden = llama(torch.tensor([ids]), own[None], (own[:, None] >= own)[None])
            logits = llama.logits(hidden)[0, -1]
            assert logits.argmax() != MASK
            ids.append(int(logits.argmax()))
            expected -= logits.log_softmax(-1).max().item()
        assert (got.tokens, got.nfe) == (ids[len(prompt) :], 6)
        assert total == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("rank", [0, 4])
def test_training_lowers_the_loss_continues_and_changes_one_embedding(prompts, tmp_path, rank):
    rng = np.random.default_rng(1)
    pairs = [(prompt, [*rng.integers(17, 24, size=20).tolist(), EOS]) for prompt in prompts]
    before, texts = make_llama(), [noise(*pair, CONFIG, rng) for pair in pairs]
    train = partial(adapt, pairs=pairs, folder=tmp_path, rank=rank, learning_rate=5e-3, batch=4, seconds=1e6)
    train(make_llama(), max_steps=15)
    after = train(make_llama(), max_steps=30)
    curve = (tmp_path / "learning_curve.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in curve] == [10, 15, 20, 30]
    assert loss_of(after, texts) < 0.8 * loss_of(before, texts)
    changed = (after.model.embed_tokens.weight != before.model.embed_tokens.weight).any(1)
    assert changed.nonzero().flatten().tolist() == [MASK]


def test_an_adapter_is_small_and_makes_the_model_from_its_base(llama, tmp_path):
    adapted = make_llama()
    make_trainable(adapted, 4)
    for module in adapted.modules():
        if isinstance(module, LowRank):
            torch.nn.init.normal_(module.up, std=0.1)
    merge(adapted)
    path = tmp_path / "adapter.safetensors"
    assert save_adapter(llama, adapted, path, 4) < 1e-6
    restored = apply_adapter(make_llama(), path)
    for name, weight in adapted.state_dict().items():
        torch.testing.assert_close(restored.state_dict()[name], weight, rtol=0.02, atol=0.01)
    per_layer = sum(sum(weight.shape) for name, weight in llama.named_parameters() if "proj" in name)
    assert path.stat().st_size < 2 * 4 * per_layer + 8192
    full = Config()
    sides = 4 * full.hidden_size + 2 * (full.hidden_size + full.num_key_value_heads * full.head_size)
    sides += 3 * (full.hidden_size + full.intermediate_size)
    assert 2 * 32 * sides * full.num_hidden_layers < 19.6e6  # what rank 32 is for the real model


def test_evaluation_has_a_line_a_rule_and_its_gate_needs_enough_prompts(llama, prompts):
    lines = evaluate(llama, llama, prompts[:3], 10)
    assert [line["rule"] for line in lines][:3] == [AUTOREGRESSIVE, ONE, "static 0.95"]
    assert not passes_gate(lines)
    good = [{**line, "num_prompts": 50, "tokens_per_forward": 1.5, "nll_per_token": 1.0} for line in lines]
    assert passes_gate(good)
    assert not passes_gate([{**line, "num_prompts": 49} for line in good])
    assert not passes_gate([{**good[0], "nll_per_token": 0.8}, *good[1:]])
    assert not passes_gate([{**line, "tokens_per_forward": 1.4} for line in good])
    assert distinct([[5, 5, 5, 5], [1, 2, 3, 4]], 2) == pytest.approx((1 / 3 + 1) / 2)


@pytest.mark.e2e
def test_the_exported_folder_decodes_in_vllm_as_it_does_here(llama, prompts, tmp_path, start_llm):
    from tests.e2e.engine import generate, nfe, sampling, tokens

    network = reference_of(llama, tmp_path)
    llm = start_llm(tmp_path, max_num_seqs=16, max_model_len=128)
    for threshold in (0.4, 0.15):
        expected = decode(llama, prompts, max_tokens=21, block_length=BLOCK, threshold=threshold)
        margins = [plain(network, prompt, threshold) for prompt in prompts]
        clear = [i for i, one in enumerate(margins) if min(one.proposal_margin, one.rule_margin) > MIN_MARGIN]
        assert len(clear) >= 7
        # Blocks are the checkpoint's own; the request does not say them.
        params = sampling(21, ignore_eos=False, stop_token_ids=[EOS], policy="static_threshold", threshold=threshold)
        completions = generate(llm, prompts, params)
        assert [tokens(completions)[i] for i in clear] == [expected[i].tokens for i in clear]
        assert [nfe(completions[i]) for i in clear] == [expected[i].nfe for i in clear]
