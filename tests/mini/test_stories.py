"""The task with the statistics of text: its checker, and what a perfect model would do with it."""

import random
from pathlib import Path

import numpy as np
import pytest

from examples.mini.evaluate import evaluate, static_rule
from examples.mini.model import MiniLLaDA
from tests.mini.story_curve import LOST_VALIDITY, TOKENS_PER_FORWARD
from vllm_osdt.mini import model_path
from vllm_osdt.mini.tasks import check, generate
from vllm_osdt.mini.tasks.base import tokenize
from vllm_osdt.mini.tasks.stories import ANIMALS, COLOURS, KINDS, STYLES, SYNONYMS

BLOCK_LENGTH, CANVAS_LENGTH = 32, 64
COUNT = 80
# Stories that the bundled model decodes, and the percent points of validity that so few may be off by.
NUM_DECODED, SAMPLING = 200, 2.0


def answered(count=60, seed=3):
    rng = random.Random(seed)
    return [(problem, problem.sample_answer(rng)) for problem in generate("stories", "held_out", count, seed)]


@pytest.mark.parametrize("chances", [*(slot.values() for slot in SYNONYMS.values()), *(kind.chances for kind in KINDS)])
def test_chances_add_up(chances):
    assert sum(chances) == pytest.approx(1.0)


def test_the_chances_of_all_templates_add_up():
    for problem, _ in answered(20):
        chances, templates = zip(*problem.templates(), strict=True)
        assert sum(chances) == pytest.approx(1.0)
        assert all(sum(words.values()) == pytest.approx(1.0) for words in templates[0])


def test_a_style_has_favourites_of_its_own():
    rng = random.Random(0)
    favourites = set()
    for style in STYLES:
        problems = [problem for problem in generate("stories", "train", 2000, 0) if problem.style == style]
        drawn = [problem.sample_answer(rng) for problem in problems]
        shares = {word: np.mean([word in tokenize(answer) for answer in drawn]) for word in SYNONYMS["weather"]}
        favourites.add(max(shares, key=shares.__getitem__))
        assert max(shares.values()) == pytest.approx(max(SYNONYMS["weather"].values()), abs=0.06)
    assert len(favourites) == len(STYLES)


@pytest.mark.parametrize("words", [ANIMALS, COLOURS])
def test_an_animal_that_changes_on_the_way_is_rejected(words):
    for problem, answer in answered():
        tokens = tokenize(answer)
        places = [index for index, token in enumerate(tokens) if token in words]
        assert len(places) == 2
        for place in places:
            for other in set(words) - {tokens[place]}:
                assert not check(problem, " ".join([*tokens[:place], other, *tokens[place + 1 :]]))


def test_names_that_change_roles_are_rejected():
    for problem, answer in answered():
        tokens = tokenize(answer)
        first, second = (
            place for place, token in enumerate(tokens) if token in problem.names and place > CANVAS_LENGTH / 3
        )
        tokens[first], tokens[second] = tokens[second], tokens[first]
        assert not check(problem, " ".join(tokens))


def test_exactly_one_thing_is_odd_where_the_prompt_asks_for_it():
    rng = random.Random(0)
    for problem in generate("stories", "train", 100, 0):
        tokens = tokenize(problem.sample_answer(rng))
        of_things = [place for place, token in enumerate(tokens) if token in (problem.kind.usual, problem.kind.odd)]
        assert sum(tokens[place] == problem.kind.odd for place in of_things) == problem.has_odd
        for place in of_things:
            changed = [*tokens]
            changed[place] = problem.kind.odd if tokens[place] == problem.kind.usual else problem.kind.usual
            assert not check(problem, " ".join(changed))


def decode_exactly(problem, threshold):
    """Decodes with the exact posterior of every position, as a perfect model would; returns tokens and forwards."""
    chances, templates = zip(*problem.templates(), strict=True)
    words = ["<eos>", *sorted({word for template in templates for slot in template for word in slot})]
    index = {word: number for number, word in enumerate(words)}
    table = np.zeros((len(templates), CANVAS_LENGTH, len(words)))
    for row, template in zip(table, templates, strict=True):
        row[len(template) :, 0] = 1.0
        for place, slot in enumerate(template):
            row[place, [index[word] for word in slot]] = list(slot.values())
    weights, canvas, nfe = np.array(chances), np.full(CANVAS_LENGTH, -1), 0
    for start in range(0, CANVAS_LENGTH, BLOCK_LENGTH):
        block = slice(start, start + BLOCK_LENGTH)
        while (masked := canvas[block] < 0).any():
            nfe += 1
            # After a text that is not valid any text is as good.
            known = weights / weights.sum() if weights.sum() > 0 else np.full(len(weights), 1 / len(weights))
            posterior = np.einsum("t,tpw->pw", known, table[:, block])
            confidence = np.where(masked, posterior.max(-1), -1.0)
            accepted = masked & (confidence >= threshold)
            accepted[confidence.argmax()] = True
            for place in start + np.flatnonzero(accepted):
                canvas[place] = posterior[place - start].argmax()
                weights = weights * table[:, place, canvas[place]]
    tokens = [words[number] for number in canvas]
    return tokens[: tokens.index("<eos>")], nfe


@pytest.fixture(scope="module")
def problems():
    return generate("stories", "held_out", COUNT, 5)


@pytest.mark.parametrize("threshold", TOKENS_PER_FORWARD)
def test_a_perfect_model_decodes_as_many_tokens_per_forward_as_published(problems, threshold):
    decoded = [decode_exactly(problem, threshold) for problem in problems]
    rate = sum(len(tokens) for tokens, _ in decoded) / sum(nfe for _, nfe in decoded)
    assert rate == pytest.approx(TOKENS_PER_FORWARD[threshold], rel=0.1)
    # Which stories go wrong is known: those with an odd thing whose every place the threshold passes.
    for problem, (tokens, _) in zip(problems, decoded, strict=True):
        passes = problem.has_odd and min(1 - chance for chance in problem.kind.chances) >= threshold
        assert check(problem, " ".join(tokens)) != passes


def test_lower_thresholds_lose_a_little_validity():
    problems = generate("stories", "held_out", 3000, 6)
    for threshold, (least, most) in LOST_VALIDITY.items():
        lost = [p.has_odd and min(1 - chance for chance in p.kind.chances) >= threshold for p in problems]
        assert least <= 100 * np.mean(lost) <= most


@pytest.fixture(scope="module")
def scores():
    """By threshold, what the bundled model does with the same stories."""
    model = MiniLLaDA.load(Path(model_path("text-mini")))
    problems = generate("stories", "held_out", NUM_DECODED, 5)
    return {
        threshold: evaluate(model, problems, static_rule(threshold), CANVAS_LENGTH) for threshold in TOKENS_PER_FORWARD
    }


def test_the_bundled_model_decodes_as_many_tokens_per_forward_as_published(scores):
    rates = {threshold: score.tokens_per_forward for threshold, score in scores.items()}
    assert rates == pytest.approx(TOKENS_PER_FORWARD, rel=0.15)


def test_the_bundled_model_writes_valid_stories_and_loses_a_little_at_lower_thresholds(scores):
    best = scores[0.9].accuracy
    assert best >= 0.98
    for threshold, (least, most) in LOST_VALIDITY.items():
        assert least - SAMPLING <= 100 * (best - scores[threshold].accuracy) <= most + SAMPLING
