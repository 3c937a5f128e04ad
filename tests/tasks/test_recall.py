import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from infini.tasks.passkey.keys import is_held_out
from infini.tasks.recall.evaluate import evaluate
from infini.tasks.recall.text import write_recall
from infini.tasks.recall.training import RecallTraining

from infini.errors import InputError


def row(length, pool, longest_gap, seed=0, held_out=False):
    tokens, answer = np.empty(length, np.uint8), np.zeros(length, bool)
    random = np.random.default_rng(seed)
    distance = write_recall(random, tokens, answer, pool, longest_gap, held_out)
    return bytes(tokens).decode(), answer, distance


@pytest.mark.parametrize(("pool", "longest_gap"), [(1, 0), (4, 32), (16, 512)])
def test_answers_are_the_digits_of_later_mentions_and_follow_from_the_first(pool, longest_gap):
    text, answer, distance = row(20_000, pool, longest_gap)
    said, last, expected, back = {}, {}, np.zeros(20_000, bool), np.zeros(20_000, int)
    for found in re.finditer(r"\nKey of ([A-Z]{2}) is ([0-9]{5})\.", text):
        name, digits = found.groups()
        assert said.setdefault(name, digits) == digits
        if name in last:
            expected[found.start(2) : found.end(2)] = True
            back[found.start(2) : found.end(2)] = found.start() - last[name]
        last[name] = found.start()
    assert len(said) == pool
    assert np.array_equal(answer[:-20], expected[:-20])  # the end may cut a statement
    assert np.array_equal(distance[:-20], back[:-20])


def test_filler_between_statements_is_as_long_as_asked():
    text, _, _ = row(50_000, 4, 128)
    gaps = [len(gap) for gap in re.split(r"\nKey of .. is .....\.", text)[1:-1]]
    assert min(gaps) == 0 and max(gaps) == 128
    assert 54 < np.mean(gaps) < 74


def test_keys_of_either_side_of_the_split():
    for held_out in (False, True):
        text, _, _ = row(5000, 16, 0, held_out=held_out)
        keys = [int(key) for key in re.findall(r"is ([0-9]{5})\.", text)]
        assert (is_held_out(np.array(keys)) == held_out).all()


def test_training_rows_differ_in_names_and_density():
    source = RecallTraining(steps=40, max_segments=4)
    counts = set()
    for step in range(40):
        batch = source[step]
        assert batch.tokens.shape[1] == batch.segments * 256 + 1
        text = bytes(batch.tokens[0].tolist()).decode()
        counts.add((len(set(re.findall("Key of (..)", text))), text.count("Key of") > 20))
    assert len({names for names, _ in counts}) >= 5 and {dense for _, dense in counts} == {True, False}


class Copier(torch.nn.Module):
    """Knows the last ``reach`` bytes: continues as the text did after the same name; else with 0."""

    def __init__(self, reach):
        super().__init__()
        self.weight, self.reach = torch.nn.Parameter(torch.zeros(1)), reach
        self.config = SimpleNamespace(vocab_size=256, segment_length=64)

    def forward(self, tokens, state=None, *, keep="all"):
        rows = state or [""] * len(tokens)
        logits = torch.zeros(*tokens.shape, 256)
        for i, new in enumerate(tokens.tolist()):
            for j, byte in enumerate(new):
                rows[i] += chr(byte)
                asked = rows[i][rows[i].rfind("\nKey of") :]
                known = rows[i][-self.reach :] if self.reach else ""
                before = known.rfind(asked[:14], 0, -len(asked))
                place = before + len(asked)
                guess = known[place] if before >= 0 and place < len(known) else "0"
                logits[i, j, ord(guess)] = 1.0
        return logits, rows


def test_accuracy_falls_to_chance_where_the_model_has_forgotten():
    rows = evaluate(Copier(reach=600), 3000, rows=2, pool=8, longest_gap=64, piece=500)
    assert sum(row["digits"] for row in rows) > 300
    for row in rows:
        if row["distance_to"] <= 512:
            assert row["digit_accuracy"] == 1.0
        if row["distance_from"] >= 1024:
            assert row["digit_accuracy"] < 0.3
    assert rows[-1]["distance_from"] >= 1024


def test_the_measured_keys_are_held_out():
    texts = []

    class Reader(Copier):
        def forward(self, tokens, state=None, *, keep="all"):
            texts.extend(bytes(row).decode() for row in tokens.tolist())
            return super().forward(tokens, state)

    evaluate(Reader(0), 500, rows=2, pool=16, longest_gap=0)
    keys = [int(key) for text in texts for key in re.findall(r"is ([0-9]{5})\.", text)]
    assert len(set(keys)) > 10 and is_held_out(np.array(keys)).all()


def test_pieces_do_not_change_the_measurement():
    whole, parts = (evaluate(Copier(300), 1000, rows=1, pool=2, piece=n) for n in (10_000, 77))
    assert whole == parts


def test_settings_that_cannot_be_measured_are_refused():
    with pytest.raises(InputError, match="length 1"):
        evaluate(Copier(0), 1)
    with pytest.raises(InputError, match="recall pools"):
        evaluate(Copier(0), 100, pool=677)


def test_an_octave_begins_at_its_power_of_two(monkeypatch):
    def written(random, tokens, answer, pool, longest_gap, held_out):
        tokens[:], answer[:] = 48, True
        return np.array([0, 16, 31, 32, 63, 64])

    monkeypatch.setattr("infini.tasks.recall.evaluate.write_recall", written)
    rows = evaluate(Copier(0), 6, rows=1)
    assert [(row["distance_from"], row["distance_to"], row["digits"]) for row in rows] == [(16, 32, 2), (32, 64, 2), (64, 128, 1)]
