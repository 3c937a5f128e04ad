"""Numbers among the words of a text."""

import re

import numpy as np
import pytest
from infini.tasks.numbers import sow_numbers
from infini.tasks.passkey.keys import is_held_out

TEXT = ("He had twelve old apples in 1830, as I saw; naïve “Constantinopolitans” sold £17,500 of them. " * 3000).encode()
SOWN = sow_numbers(np.frombuffer(TEXT, np.uint8), 0.1, seed=3).tobytes()


def words_of(text):
    return re.findall(rb"[A-Za-z]+|[0-9]+|[^A-Za-z0-9]+", text)


def test_a_word_becomes_a_number_of_as_many_digits_and_nothing_else_changes():
    before, after = words_of(TEXT), words_of(SOWN)
    assert len(before) == len(after)
    changed = [(old, new) for old, new in zip(before, after) if old != new]
    assert changed and all(new.isdigit() and len(old) == len(new) and 3 <= len(old) <= 9 for old, new in changed)
    assert {len(new) for _, new in changed} == {3, 4, 6}  # what the sentence has: "ve" is too short, the city too long
    assert not any(is_held_out(int(new)) for _, new in changed)
    assert not any(new.startswith(b"0") for _, new in changed)


def test_the_share_is_kept_over_the_text_and_differs_from_stretch_to_stretch():
    long_enough = [word for word in words_of(TEXT) if word.isalpha() and 3 <= len(word) <= 9]
    changed = sum(old != new for old, new in zip(words_of(TEXT), words_of(SOWN)))
    assert changed / len(long_enough) == pytest.approx(0.1, abs=0.03)
    different = np.frombuffer(TEXT, np.uint8) != np.frombuffer(SOWN, np.uint8)
    shares = [different[start : start + 8192].mean() for start in range(0, len(TEXT) - 8192, 8192)]
    assert max(shares) > 4 * min(shares)


def test_the_text_given_is_not_changed_and_the_seed_decides():
    text = np.frombuffer(TEXT, np.uint8)
    assert sow_numbers(text, 0.1, seed=3).tobytes() == SOWN != sow_numbers(text, 0.1, seed=4).tobytes()
    assert sow_numbers(text, 0.0).tobytes() == TEXT
