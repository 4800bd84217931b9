"""The race keeps what a selection keeps after all draws; its bounds hold for every outcome."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_mprm.annotation.budget import Race, Tally, beta_binomial, final_bis, highest_bis, likely_bis, next_draws
from trl_mprm.selection.bis import balanced_information


# Draws of one step: right, wrong or lost. Few kinds of steps, so that many rollouts tie.
KINDS = st.sampled_from(["all", "none", "some", "lost", "mostly"])
SHARES = {"all": (1, 0, 0), "none": (0, 1, 0), "some": (0.5, 0.5, 0), "lost": (0.3, 0.3, 0.4), "mostly": (0.9, 0.1, 0)}


def draw(kinds: list[list[str]], n: int, seed: int) -> list[list[list[bool | None]]]:
    rng = np.random.default_rng(seed)
    outcomes = np.array([True, False, None], object)
    return [[outcomes[rng.choice(3, n, p=SHARES[kind])].tolist() for kind in steps] for steps in kinds]


def kept_with_all_draws(corpus, n, fraction, alpha) -> list[int]:
    """By the selection's own arithmetic and a stable sort."""
    scores, offsets = [], [0]
    for steps in corpus:
        measured = [[outcome for outcome in draws if outcome is not None] for draws in steps]
        scores += [sum(draws) / len(draws) for draws in measured if draws]
        offsets.append(len(scores))
    bis = balanced_information(np.array(scores, float), np.array(offsets), alpha)["bis"]
    valid = [index for index in range(len(corpus)) if not np.isnan(bis[index])]
    quota = max(1, int(len(valid) * fraction))
    return sorted(sorted(valid, key=lambda index: (-bis[index], index))[:quota])


def run_race(corpus, n, fraction, alpha, batch, error=0.0) -> tuple[Race, int]:
    tallies = [Tally.new(len(steps), n) for steps in corpus]
    race = Race(tallies, fraction, alpha, error)
    while indices := race.take(batch):
        for index in indices:
            for step, count in next_draws(tallies[index]):
                start = tallies[index].asked[step]
                tallies[index].add(step, corpus[index][step][start : start + count])
            race.put_back(index)
    return race, sum(sum(tally.asked) for tally in tallies)


@settings(max_examples=150, deadline=None)
@given(
    kinds=st.lists(st.lists(KINDS, min_size=1, max_size=5), min_size=1, max_size=25),
    n=st.sampled_from([1, 2, 3, 8, 10, 16]),
    fraction=st.sampled_from([0.1, 0.25, 0.5, 1.0]),
    alpha=st.sampled_from([0.0, 0.05, 0.2]),
    batch=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
def test_exact_race_keeps_what_all_draws_keep(kinds, n, fraction, alpha, batch, seed):
    corpus = draw(kinds, n, seed)
    race, _ = run_race(corpus, n, fraction, alpha, batch)
    assert race.kept() == kept_with_all_draws(corpus, n, fraction, alpha)
    assert all(race.tallies[index].finished for index in race.kept())


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(KINDS, min_size=1, max_size=2),
    n=st.integers(1, 3),
    asked=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_highest_bis_is_the_maximum_over_every_outcome(kinds, n, asked, seed):
    asked = min(asked, n)
    tally = Tally.new(len(kinds), n)
    for step, draws in enumerate(draw([kinds], n, seed)[0]):
        tally.add(step, draws[:asked])
    best = -1.0
    rest_of_a_step = list(itertools.product([True, False, None], repeat=n - asked))
    for outcome in itertools.product(rest_of_a_step, repeat=len(kinds)):
        ended = Tally(n, [*tally.right], [*tally.measured], [*tally.asked])
        for step, draws in enumerate(outcome):
            ended.add(step, draws)
        best = max(best, final_bis(ended, 0.2))
    assert highest_bis(tally, 0.2) == pytest.approx(best, abs=1e-11)
    assert highest_bis(tally, 0.2) >= best


def test_final_bis_is_that_of_the_selection_to_the_last_bit():
    rng = np.random.default_rng(0)
    for n in (7, 10, 16):
        for _ in range(50):
            right = rng.integers(0, n + 1, rng.integers(1, 9)).tolist()
            tally = Tally(n, right, [n] * len(right), [n] * len(right))
            scores = np.array([count / n for count in right])
            expected = balanced_information(scores, np.array([0, len(right)]), 0.2)["bis"][0]
            assert final_bis(tally, 0.2) == expected


def test_race_spends_less_than_a_third_on_a_corpus_like_the_papers():
    rng = np.random.default_rng(0)
    corpus = []
    for _ in range(300):
        chance = np.full(rng.integers(3, 8), 1.0 if rng.random() < 0.19 else rng.beta(8, 1.5))
        if rng.random() < 0.08:
            chance[rng.integers(1, len(chance)) :] = 0
        corpus.append((rng.random((len(chance), 16)) < chance[:, None]).tolist())
    race, spent = run_race(corpus, 16, 0.1, 0.2, batch=4)
    assert race.kept() == kept_with_all_draws(corpus, 16, 0.1, 0.2)
    assert spent < 0.3 * sum(len(steps) * 16 for steps in corpus)
    confident, spent_confident = run_race(corpus, 16, 0.1, 0.2, batch=4, error=0.01)
    assert spent_confident < 0.3 * sum(len(steps) * 16 for steps in corpus)
    assert len(set(confident.kept()) & set(race.kept())) >= 0.95 * len(race.kept())


def test_beta_binomial_against_scipy():
    from scipy.stats import betabinom

    for right, measured, left, prior in [(3, 4, 12, (0.5, 0.5)), (0, 5, 11, (0.6, 0.1)), (2, 2, 3, (1.0, 2.0))]:
        expected = betabinom(left, prior[0] + right, prior[1] + measured - right).pmf(np.arange(left + 1))
        assert beta_binomial(right, measured, left, prior) == pytest.approx(expected)


def test_likely_bis_is_exceeded_as_often_as_it_says():
    rng = np.random.default_rng(1)
    tally, prior, alpha = Tally(16, [3, 2, 0], [4, 4, 3], [4, 4, 3]), (0.7, 0.3), 0.2
    finals = []
    for _ in range(4000):
        ended = Tally(16, [*tally.right], [*tally.measured], [*tally.asked])
        for step in range(3):
            chance = rng.beta(prior[0] + tally.right[step], prior[1] + tally.measured[step] - tally.right[step])
            ended.add(step, (rng.random(16 - tally.asked[step]) < chance).tolist())
        finals.append(final_bis(ended, alpha))
    for error in (0.01, 0.1, 0.5):
        exceeded = np.mean(np.array(finals) > likely_bis(tally, alpha, error, prior) + 1e-12)
        assert exceeded <= error + 3 * np.sqrt(error * (1 - error) / 4000)
    assert likely_bis(tally, alpha, 0.0, prior) == highest_bis(tally, alpha)
