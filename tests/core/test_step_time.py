"""The model of a step's time: exact on exact data, robust on noise, silent until it knows."""

import random

import pytest

from octavo.core.step_time import StepTimeModel

BASE, PER_TOKEN, PER_CONTEXT = 2e-3, 5e-5, 2e-7


def seconds(tokens, context):
    return BASE + PER_TOKEN * tokens + PER_CONTEXT * context


def fitted(noise=0.0, steps=400, slower=1.0):
    rng, model = random.Random(7), StepTimeModel()
    for _ in range(steps):
        tokens, context = rng.randrange(1, 512), rng.randrange(0, 50_000)
        model.observe(
            tokens, context, slower * seconds(tokens, context) * (1 + noise * rng.uniform(-1, 1))
        )
    return model


@pytest.mark.parametrize(("noise", "within"), [(0.0, 1e-4), (0.3, 1e-3)])
def test_predictions_follow_what_was_measured(noise, within):
    model = fitted(noise)
    for tokens, context in ((1, 0), (64, 10_000), (512, 50_000)):
        expected = seconds(tokens, context)
        assert model.predict(tokens, context) == pytest.approx(expected, abs=within, rel=0.05)


def test_tokens_within_is_the_inverse():
    model = fitted()
    tokens = model.tokens_within(0.02, 20_000)
    assert model.predict(tokens, 20_000) <= 0.02 < model.predict(tokens + 1, 20_000)
    assert model.tokens_within(0.0, 0) == 0


def test_the_present_counts_most():
    model = fitted()
    for _ in range(300):
        model.observe(100, 1000, 3 * seconds(100, 1000))
    assert model.predict(100, 1000) == pytest.approx(3 * seconds(100, 1000), rel=0.15)


def test_nothing_is_said_before_anything_is_known():
    model = StepTimeModel()
    assert model.predict(1, 1) is model.tokens_within(1.0, 1) is None
    for _ in range(20):
        model.observe(1, 0, 0.002)
    assert model.predict(1, 0) == pytest.approx(0.002, rel=0.01)
