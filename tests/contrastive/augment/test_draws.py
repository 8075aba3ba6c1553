"""Random numbers belong to samples and look random: those of neighbours, purposes and seeds have nothing in common."""

from __future__ import annotations

import numpy as np

from contrastive.augment.draws import Draws, mix

SAMPLES = np.arange(50_000)


def test_the_mixer_is_splitmix64() -> None:
    # first outputs for seed 1234567, as published with the reference implementation of the generator
    draws = Draws(np.array([1234567], dtype=np.uint64))
    assert [int(draws.words(number)[0]) for number in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
    assert len(set(mix(np.arange(1000, dtype=np.uint64)).tolist())) == 1000


def test_a_sample_has_the_same_numbers_in_any_company() -> None:
    whole, part = Draws.of(3, SAMPLES), Draws.of(3, SAMPLES[100:200][::-1])
    assert np.array_equal(part.words(4), whole.words(4)[100:200][::-1])
    assert np.array_equal(whole.take(np.arange(100, 200)).fork(2).words(0)[::-1], part.fork(2).words(0))
    numbers = np.arange(len(SAMPLES)) % 5
    assert np.array_equal(whole.words(numbers)[numbers == 3], whole.words(3)[numbers == 3])


def test_numbers_are_uniform_and_uncorrelated() -> None:
    streams = [
        Draws.of(seed, SAMPLES).fork(purpose).words(number)
        for seed in (0, 1)
        for purpose in (0, 1)
        for number in (0, 1)
    ]
    streams += [Draws.of(0, SAMPLES).words(number) for number in (0, 1)]
    values = np.stack(streams).astype(np.float64) / 2**64
    counts = np.stack([np.histogram(row, bins=100, range=(0, 1))[0] for row in values])
    chi_squares = ((counts - 500) ** 2 / 500).sum(axis=1)
    assert (np.abs(chi_squares - 99) < 5 * np.sqrt(2 * 99)).all()
    between = np.corrcoef(values) - np.eye(len(values))
    assert np.abs(between).max() < 5 / np.sqrt(len(SAMPLES))
    neighbours = [np.corrcoef(row[1:], row[:-1])[0, 1] for row in values]
    assert np.abs(neighbours).max() < 5 / np.sqrt(len(SAMPLES))


def test_below_reaches_every_number_and_no_other() -> None:
    bounds = 1 + SAMPLES % 7
    drawn = Draws.of(5, SAMPLES).below(bounds, 0)
    assert (drawn >= 0).all()
    assert (drawn < bounds).all()
    assert all(set(drawn[bounds == bound].tolist()) == set(range(bound)) for bound in range(1, 8))
