import pickle
import re
import time

import numpy as np
import pytest
import torch
from infini.tasks.passkey.keys import is_held_out
from infini.tasks.passkey.needles import FILLER, NEEDLE, QUESTION, TASK
from infini.tasks.passkey.training import PasskeyTraining

from infini.errors import InputError

ONLY_PASSKEY = dict(recall_share_start=0.0, recall_share_end=0.0)


def rows(source, steps):
    """(segments, text, answer mask) of every row of these batches."""
    for step in steps:
        batch = source[step]
        for tokens, answer in zip(batch.tokens, batch.answer):
            yield batch.segments, bytes(tokens.tolist()).decode(), answer.numpy()


def test_a_batch_depends_on_seed_and_step_alone():
    source = PasskeyTraining(steps=50, seed=3)
    source[7], source[20]  # what was read before must not matter
    again = pickle.loads(pickle.dumps(source))
    for step in (7, 49):
        assert torch.equal(source[step].tokens, again[step].tokens)
        assert torch.equal(source[step].answer, again[step].answer)
    assert not np.array_equal(source[7].tokens[0], PasskeyTraining(steps=50, seed=4)[7].tokens[0])
    assert not np.array_equal(source[7].tokens[0, :250], source[8].tokens[0, :250])


def test_passkey_rows_are_the_benchmarks_text_with_questions_in_it():
    for _, text, answer in rows(PasskeyTraining(steps=20, **ONLY_PASSKEY), range(0, 20, 2)):
        key = re.search("The pass key is ([0-9]{5})", text)[1]
        question = re.escape(f"\n{QUESTION} {key}") + r"(\.\n|\.?\Z)"  # the row's end may cut the last
        needle = "\n" + NEEDLE.format(key=key) + "\n"
        assert text.startswith(TASK + "\n") and text.count(needle) == 1
        rest = re.sub(question, "", text.removeprefix(TASK + "\n").replace(needle, ""))
        assert rest in FILLER * (len(rest) // len(FILLER) + 2)  # uninterrupted by what was put in

        marks = np.flatnonzero(answer)
        asked = [found.end() + 1 + i for found in re.finditer(re.escape(QUESTION), text) for i in range(6)]
        assert marks.tolist() == [place for place in asked if place < len(text)]
        assert {text[i] for i in marks} == set(key) | {"."}  # that the number ends there is learned too


def test_keys_of_the_benchmark_are_never_trained():
    source = PasskeyTraining(steps=200)
    seen = {int(n) for _, text, _ in rows(source, range(0, 200, 4)) for n in re.findall(r"\d{5}", text)}
    assert len(seen) > 1000
    assert not is_held_out(np.array(sorted(seen))).any()


def test_the_last_question_ends_in_the_last_segment_and_often_on_its_border():
    source = PasskeyTraining(steps=400, growth=0.0, max_segments=12, **ONLY_PASSKEY)
    ends = []
    for segments, text, answer in rows(source, range(300)):
        end = text.rindex(QUESTION) + len(QUESTION)
        assert (segments - 1) * 256 <= end <= segments * 256 - 5
        assert answer[end + 1 : end + 7].all() and not answer[end + 7 :].any()
        ends.append(end % 256)
    assert 0.22 < np.mean(np.array(ends) == 0) < 0.29
    assert len(set(ends)) > 230


def test_the_key_stands_anywhere():
    source = PasskeyTraining(steps=100, min_segments=8, max_segments=8, **ONLY_PASSKEY)
    depths = []
    for _, text, _ in rows(source, range(100)):
        needle, last = text.index("\nThe pass key is"), text.rindex("\n" + QUESTION)
        depths.append((needle - len(TASK) - 1) / (last - 60 - len(TASK) - 1))
    histogram = np.histogram(depths, bins=10, range=(0, 1))[0]
    assert histogram.min() > 0.7 * len(depths) / 10


def around_the_needle(text):
    """Bytes of filler before the needle, and between the needle and the last question."""
    needle, question = text.index("\nThe pass key is "), text.rindex("\nWhat is")
    return needle - len(TASK), question - text.index("\n", needle + 1)


@pytest.mark.parametrize("gap_share", [0.0, 1.0])
def test_needles_stand_first_and_near_in_their_shares(gap_share):
    n, segments = 256, 24
    shares = dict(first_share=0.5, near_share=0.25, dense_question_share=0.0, gap_share=gap_share, gap_after=0.0)
    source = PasskeyTraining(
        steps=80, segment_length=n, min_segments=segments, max_segments=segments, growth=0.0, **shares, **ONLY_PASSKEY
    )
    places = [around_the_needle(text) for _, text, _ in rows(source, range(80))]
    first, near = ([distance <= n for distance in column] for column in zip(*places))
    if gap_share:  # the border of the gap is anywhere, and nothing is drawn near it
        assert np.mean(first) > 0.5
    else:
        by_chance = 1 / segments
        assert np.mean(near) == pytest.approx(0.25 + 0.75 * 0.5 * by_chance, abs=0.05)
        assert np.mean(first) == pytest.approx(0.75 * (0.5 + 0.5 * by_chance), abs=0.05)


def test_half_of_the_rows_ask_every_half_to_two_segments():
    source = PasskeyTraining(steps=100, min_segments=32, max_segments=32, **ONLY_PASSKEY)
    dense, total = 0, 0
    for _, text, _ in rows(source, range(100)):
        starts = [found.start() for found in re.finditer(re.escape("\n" + QUESTION), text)]
        total += 1
        dense += len(starts) > 1
        needle_end = text.index(" is the pass key.\n") + len(" is the pass key.\n")
        asked = len("\n" + QUESTION) + 8
        gaps = np.diff([needle_end - asked, *starts]) - asked
        assert all(128 <= gap <= 512 for gap in gaps[:-1])
    assert 0.4 < dense / total < 0.6


def test_segments_grow_over_the_first_half_and_the_batch_stays_as_big():
    source = PasskeyTraining(steps=1000)
    assert [source.top(step) for step in (0, 250, 500, 999)] == [2, 49, 96, 96]
    early, late = [[source[i].segments for i in range(a, a + 200)] for a in (100, 700)]
    assert min(early) >= 2 and max(early) <= source.top(300)
    assert max(late) > 85 and min(late) < 10
    for step in range(0, 1000, 50):
        batch = source[step]
        assert batch.tokens.shape[1] == batch.segments * 256 + 1
        assert 32768 / 2 < batch.predicted_tokens <= 32768


def test_recall_rows_give_way_to_passkey_rows():
    source = PasskeyTraining(steps=1000, max_segments=8)
    assert [source.recall_share(x) for x in (0, 0.25, 0.5, 0.99)] == pytest.approx([1, 0.6, 0.2, 0.2])
    for start, share in ((0, 1.0), (245, 0.6), (700, 0.2)):
        texts = [text for _, text, _ in rows(source, range(start, start + 20))]
        assert np.mean([not text.startswith(TASK) for text in texts]) == pytest.approx(share, abs=0.08)


def test_one_process_makes_half_a_million_tokens_a_second():
    source = PasskeyTraining(steps=1000)
    source[0]
    started = time.process_time()
    tokens = sum(source[step].predicted_tokens for step in range(0, 1000, 20))
    assert tokens / (time.process_time() - started) > 500_000


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(segment_length=64), "min_segments 2 of segment_length 64 are 128 tokens.*252"),
        (dict(max_segments=1), "max_segments is 1"),
        (dict(border_share=1.5), "border_share is 1.5"),
        (dict(seed=-1), "seed is -1"),
        (dict(tokens_per_batch=0), "tokens_per_batch is 0"),
        (dict(recall_pools=(0,)), "recall pools are"),
        (dict(recall_longest_gaps=()), "at least one"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting, message):
    with pytest.raises(InputError, match=message):
        PasskeyTraining(steps=10, **setting)


def test_the_shortest_rows_that_are_allowed_can_be_written():
    source = PasskeyTraining(steps=3, segment_length=126, max_segments=2, **ONLY_PASSKEY)
    assert source[0].answer.any(1).all()


def test_a_step_after_the_last_is_an_index_error():
    with pytest.raises(IndexError):
        PasskeyTraining(steps=3)[3]
