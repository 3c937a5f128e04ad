import pickle
import re

import numpy as np
import pytest
import torch
from infini.tasks.passkey.needles import FILLER, NEEDLES
from infini.tasks.passkey.training import PasskeyTraining

from infini.errors import InputError

SAID = rb"\n(?:The pass key has changed\. )?(?:The pass key|One of the special)[^\n]*\.\n"
ASKED = rb"\n(?:What is[^\n?]*\? The (?:pass key|special)[^\n?]* is) (\d+)"
ALWAYS = dict(gap_share=1.0, gap_after=0.0, gap_growth=0.0)
KINDS = dict(competing_4=0.25, competing_8=0.25, updated=0.2, niah_single_1=0.2)
SMALL = dict(min_segments=2, max_segments=12, growth=0.0, max_gap_segments=4)


def texts(batch):
    """(tokens before the gap, the gap, tokens after it, answer mask) of each row, as the model reads it."""
    n = (batch.tokens.shape[1] - 1) // batch.segments
    border, gap = batch.gap.position * n, batch.gap.segments * n
    pieces = batch.gap.piece(0, gap)
    for tokens, middle, answer in zip(batch.tokens, pieces, batch.answer):
        row = bytes(tokens.tolist())
        yield row[:border], bytes(middle.tolist()), row[border:], answer.numpy()


def test_the_batches_without_a_gap_are_those_of_a_run_without_gaps():
    plain = PasskeyTraining(steps=300, max_segments=8)
    source = PasskeyTraining(steps=300, max_segments=8, gap_share=0.25, max_gap_segments=8)
    gaps = []
    for step in range(300):
        batch = source[step]
        gaps.append(batch.gap is not None)
        if batch.gap is None:
            assert torch.equal(batch.tokens, plain[step].tokens)
            assert torch.equal(batch.answer, plain[step].answer)
    assert not any(gaps[:100])
    assert 0.17 < np.mean(gaps[100:]) < 0.33


@pytest.mark.parametrize("segment_length", [126, 256])
def test_all_is_said_before_the_gap_and_asked_after_it(segment_length):
    source = PasskeyTraining(
        steps=60, seed=1, segment_length=segment_length, needle_shares=KINDS, **SMALL, **ALWAYS
    )
    kinds, decoys_after = set(), 0
    for step in range(60):
        batch = source[step]
        for before, _, after, answer in texts(batch):
            *keys, key = re.findall(ASKED, after)  # the last is the needle's, those on the way may be decoys'
            assert re.search(ASKED, before) is None
            said = [text for text in re.findall(SAID, before) if key in text]
            assert len(said) == 1
            assert key not in b"".join(re.findall(SAID, after))
            if b"has changed" in said[0]:  # what it was before is said before
                assert [key in text for text in re.findall(SAID, before)] == [False, True]
            decoys_after += len(re.findall(SAID, after))
            kinds.add((len(re.findall(SAID, before + after)), b"special" in said[0]))
            marks = np.flatnonzero(answer)
            assert marks.min() > len(before)
            row = before + after
            answered = bytes(row[i] for i in marks)
            assert b"".join(one + b"." for one in [*keys, key]).startswith(answered) and len(answered) >= len(key)
            end = re.search(rb".*" + ASKED, row, re.DOTALL).end(1) - len(key) - 1
            assert end >= (batch.segments - 1) * segment_length  # the last question, in the last segment
    assert kinds == {(1, False), (2, False), (4, False), (8, False), (1, True)}
    assert decoys_after > 50


def test_the_filler_goes_on_through_the_gap():
    source = PasskeyTraining(steps=40, needle_shares=KINDS, **SMALL, **ALWAYS)
    for step in range(40):
        batch = source[step]
        assert batch.gap.filler.dtype == torch.uint8 and batch.gap.filler.shape[1] == len(FILLER)
        for before, middle, after, _ in texts(batch):
            text = re.sub(ASKED + rb"(\.\n|\.?\Z)", b"", re.sub(SAID, b"", before) + middle + re.sub(SAID, b"", after))
            text = text.partition(b"\n")[2]
            own = (NEEDLES["niah_single_1"].filler if b"special" in before else FILLER).encode()
            assert text in own * (len(text) // len(own) + 2)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_natural_text_goes_on_through_the_gap(tmp_path, share):
    words = np.random.default_rng(0).integers(97, 123, (20_000, 5), np.uint8)
    book = " ".join(bytes(word).decode() for word in words).encode()
    (tmp_path / "book.txt").write_bytes(book)
    source = PasskeyTraining(
        steps=20, haystacks=(str(tmp_path / "book.txt"),), text_share=share, **SMALL, **ALWAYS
    )
    found = set()
    for step in range(20):
        batch = source[step]
        assert batch.gap.filler.shape[1] == batch.gap.segments * 256
        for before, middle, after, _ in texts(batch):
            text = re.sub(ASKED + rb"(\.\n|\.?\Z)", b"", re.sub(SAID, b"", before) + middle + after)
            text = text.partition(b"\n")[2]
            natural = text in book + book
            assert natural or text in FILLER.encode() * (len(text) // 90 + 2)
            found.add(natural)
    assert found == ({True} if share == 1 else {True, False})


def test_gaps_are_log_uniform_and_grow():
    source = PasskeyTraining(steps=3000, max_segments=8, gap_share=1.0, tokens_per_batch=2048)
    assert [source.longest_gap(x) for x in (0.0, 1 / 3, 0.5, 2 / 3, 1.0)] == [1, 1, 32, 1024, 1024]
    early = [source[step].gap.segments for step in range(1500, 1600)]
    assert max(early) <= source.longest_gap(1600 / 3000) and min(early) == 1
    late = np.array([source[step].gap.segments for step in range(2000, 3000, 2)])
    assert late.min() == 1 and 900 < late.max() <= 1024
    octaves = np.histogram(np.log2(late + 0.5), bins=5, range=(0, 10))[0]
    assert octaves.min() > 0.7 * len(late) / 5


def test_the_gap_stands_at_every_border():
    source = PasskeyTraining(steps=200, min_segments=6, max_segments=6, tokens_per_batch=2048, **ALWAYS)
    positions = [source[step].gap.position for step in range(200)]
    assert set(positions) == {1, 2, 3, 4, 5}


def test_a_long_gap_has_few_rows():
    source = PasskeyTraining(
        steps=300, max_segments=4, gap_tokens_per_batch=2**18, max_gap_segments=2048, **ALWAYS
    )
    rows = []
    for step in range(300):
        batch = source[step]
        rows.append(len(batch.tokens))
        assert len(batch.tokens) == 1 or len(batch.tokens) * batch.gap.segments * 256 <= 2**18
        assert batch.predicted_tokens <= 32768
    assert min(rows) == 1 and max(rows) > 16


def test_a_batch_with_a_gap_depends_on_seed_and_step_alone():
    source = PasskeyTraining(steps=9, needle_shares=KINDS, **SMALL, **ALWAYS)
    source[3]
    again = pickle.loads(pickle.dumps(source))[5]
    assert torch.equal(source[5].tokens, again.tokens) and torch.equal(source[5].gap.filler, again.gap.filler)
    other = PasskeyTraining(steps=9, seed=1, needle_shares=KINDS, **SMALL, **ALWAYS)[5]
    assert other.tokens.shape != again.tokens.shape or not torch.equal(other.tokens, again.tokens)
    with pytest.raises(IndexError):
        source[9]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(gap_share=1.1), "gap_share is 1.1"),
        (dict(gap_after=-0.1), "gap_after is -0.1"),
        (dict(max_gap_segments=0), "max_gap_segments is 0"),
        (dict(gap_tokens_per_batch=0), "gap_tokens_per_batch is 0"),
        (
            dict(gap_share=0.1, segment_length=128, min_segments=2, max_segments=2),
            "max_segments is 2, but with a gap a passkey row takes 3 segments",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(setting, message):
    with pytest.raises(InputError, match=message):
        PasskeyTraining(steps=10, **setting)
