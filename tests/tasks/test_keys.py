import numpy as np
import pytest
from infini.tasks.passkey.keys import draw_keys, is_held_out

from infini.errors import InputError


def test_the_split_is_the_same_for_ever():
    # Models are trained on one side of it: another split would make old checkpoints cheat.
    held = np.arange(10_000, 100_000)[is_held_out(np.arange(10_000, 100_000))]
    assert (len(held), int(held.sum())) == (9_042, 492_324_155)
    assert held[:3].tolist() == [10002, 10019, 10027]


@pytest.mark.parametrize("digits", [3, 5, 18])
def test_the_two_sides_share_no_key(digits):
    random = np.random.default_rng(1)
    training = draw_keys(random, 5000, digits, held_out=False)
    measured = draw_keys(random, 5000, digits, held_out=True)
    assert not set(training.tolist()) & set(measured.tolist())
    assert {len(str(key)) for key in [*training.tolist(), *measured.tolist()]} == {digits}


def test_every_digit_occurs_at_every_place():
    keys = draw_keys(np.random.default_rng(2), 20_000, 5, held_out=True)
    for power in range(5):
        counts = np.bincount(keys // 10**power % 10, minlength=10)[1 if power == 4 else 0 :]
        assert counts.min() > 0.8 * 20_000 / len(counts)


@pytest.mark.parametrize("digits", [2, 19])
def test_keys_with_too_few_or_too_many_digits_are_refused(digits):
    with pytest.raises(InputError, match=f"digits is {digits}.*3 to 18"):
        draw_keys(np.random.default_rng(0), 1, digits, held_out=True)
