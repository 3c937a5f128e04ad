"""Passkey training with other needles and with natural text."""

import hashlib
import pickle
import re
from collections import Counter

import numpy as np
import pytest
import torch
from infini.tasks.passkey.keys import is_held_out
from infini.tasks.passkey.needles import FILLER, NEEDLES, QUESTION, TASK, WORDINGS
from infini.tasks.passkey.training import PasskeyTraining
from infini.tasks.recall.training import RecallTraining

from infini.errors import InputError

ONLY_PASSKEY = dict(recall_share_start=0.0, recall_share_end=0.0)
LONG = dict(min_segments=8, max_segments=8)
PHRASE = r"The (?!pass key|special magic|grass is|sky is|sun is)(?:[a-z]+ ){1,3}[a-z]+"
SAID = rf"\n(?:The pass key has changed\. )?(?:The pass key|One of the special|{PHRASE} \d{{5}}\. )[^\n]*\n"
ASKED = rf"\n(?:What is[^\n?]*\? The (?:pass key|special)[^\n?]* is|[A-Z][a-z ]+[.:?] {PHRASE}) (\d+)"


def rows(source, steps):
    for step in steps:
        batch = source[step]
        for tokens, answer in zip(batch.tokens, batch.answer):
            yield bytes(tokens.tolist()), answer.numpy()


def kind_of(text):
    said = re.findall(SAID, text)
    if "special magic" in text:
        return "niah_single_1"
    if "has changed" in text:
        return "updated"
    if re.search(rf"\n{PHRASE} \d{{5}}", text):
        return "phrase"
    return "passkey" if len(said) == 1 else f"competing_{len(said)}"


def test_each_kind_has_its_share():
    shares = dict(competing_4=0.1, competing_8=0.2, updated=0.3, niah_single_1=0.25)
    source = PasskeyTraining(steps=60, needle_shares=shares, **LONG, **ONLY_PASSKEY)
    found = Counter(kind_of(text.decode()) for text, _ in rows(source, range(60)))
    total = sum(found.values())
    assert {name: round(count / total, 2) for name, count in found.items()} == pytest.approx(
        shares | dict(passkey=0.15), abs=0.05
    )


@pytest.mark.parametrize("name", [name for name, kind in NEEDLES.items() if kind.trained and name != "passkey"])
def test_rows_are_the_benchmarks_text_and_every_question_has_the_right_answer(name):
    source = PasskeyTraining(steps=20, needle_shares={name: 1.0}, **LONG, **ONLY_PASSKEY)
    dense = 0
    for text, answer in rows(source, range(20)):
        text = text.decode()
        assert kind_of(text) == name
        said = [(found.end(), found[0]) for found in re.finditer(SAID, text)]
        questions = list(re.finditer(ASKED, text))
        dense += len(questions) > 1
        for question in questions:  # the last one's, and on the way any that was said
            asked, key = question[0].rpartition(" ")[0], question[1]
            who = re.search(r" (?:of|for) ([\w-]+)", asked) if name != "phrase" else None
            about = [(at, said_) for at, said_ in said if who is None or f" {who[1]} is" in said_]
            if name == "phrase":  # the words before the number are those that the question ends with
                about = [(at, said_) for at, said_ in said if said_.startswith(f"\n{re.search(PHRASE, asked)[0]} ")]
            assert key in about[-1][1]  # of several about the same, the last counts
            if name == "updated":
                assert len(about) == 2 and key not in about[0][1]
            else:
                assert len(about) == 1
            assert question.start() >= about[-1][0] - 1

        # The digits, and the stop after them, but where the row's end cuts it off.
        marks = np.concatenate([np.arange(question.start(1), question.end(1) + 1) for question in questions])
        marks = marks[marks < len(text)]
        assert np.flatnonzero(answer).tolist() == marks.tolist()
        assert not is_held_out(np.array([int(number) for number in re.findall(r"\d+", text)])).any()
        rest = re.sub(SAID, "", re.sub(ASKED + r"(\.\n|\.?\Z)", "", text)).partition("\n")[2]
        own = NEEDLES[name].filler
        assert rest in own * (len(rest) // len(own) + 2)
    assert dense > 20


def test_a_row_too_short_for_its_kind_is_a_passkey_row():
    source = PasskeyTraining(
        steps=20, min_segments=2, max_segments=4, growth=0.0, needle_shares=dict(competing_8=1.0), **ONLY_PASSKEY
    )
    kinds = {(len(text), kind_of(text.decode())) for text, _ in rows(source, range(20))}
    assert (513, "passkey") in kinds and (1025, "competing_8") in kinds and (513, "competing_8") not in kinds


def test_no_row_is_worded_like_the_wording_that_only_measures():
    shares = {name: 0.2 for name, kind in NEEDLES.items() if kind.trained and name != "passkey"}
    source = PasskeyTraining(steps=20, needle_shares=shares, **LONG)
    everything = b"".join(text for text, _ in rows(source, range(20))).decode()
    sentences = {part.strip() for pair in WORDINGS for text in pair for part in re.split(r"\{key\}|[.?] ", text)}
    for sentence in sentences:
        assert len(sentence) < 8 or sentence not in everything


@pytest.fixture
def book(tmp_path):
    words = np.random.default_rng(0).integers(97, 123, (20_000, 5), np.uint8)  # no two windows are alike
    text = " ".join(bytes(word).decode() for word in words)
    (tmp_path / "one.txt").write_text(text[:60_000])
    (tmp_path / "two.txt").write_text(text[60_000:])
    return f"{tmp_path}/*.txt", text[:60_000] + "\n\n" + text[60_000:]


def test_filler_is_a_window_of_natural_text_in_its_share_of_rows(book):
    pattern, text = book
    source = PasskeyTraining(steps=40, haystacks=(pattern,), text_share=0.4, **LONG, **ONLY_PASSKEY)
    natural, starts, total = 0, [], 0
    for row, _ in rows(source, range(40)):
        filler = re.sub(ASKED + r"(\.\n|\.?\Z)", "", re.sub(SAID, "", row.decode())).removeprefix(TASK + "\n")
        total += 1
        if filler in FILLER * (len(filler) // len(FILLER) + 2):
            continue
        natural += 1
        assert filler in text + text
        starts.append((text + text).index(filler) / len(text))
    assert 0.3 < natural / total < 0.5
    assert np.histogram(starts, bins=4, range=(0, 1))[0].min() > 0.5 * natural / 4


def test_half_of_the_rows_in_natural_text_have_numbers_among_its_words(book):
    pattern, text = book
    source = PasskeyTraining(steps=40, haystacks=(pattern,), text_share=1.0, number_share=0.1, **LONG, **ONLY_PASSKEY)
    with_numbers, total = 0, 0
    for row, _ in rows(source, range(40)):
        filler = re.sub(ASKED + r"(\.\n|\.?\Z)", "", re.sub(SAID, "", row.decode())).removeprefix(TASK + "\n")
        total += 1
        with_numbers += bool(re.search(r"\b\d{5}\b", filler))
        assert with_numbers or filler in text + text
    assert 0.35 < with_numbers / total < 0.65


@pytest.mark.parametrize("task", [PasskeyTraining, RecallTraining])
def test_dense_recall_stands_in_natural_text_too(task, book):
    pattern, text = book
    source = task(steps=4, haystacks=(pattern,), text_share=1.0, **LONG)
    for row, answer in rows(source, range(1)):
        gaps = re.split(r"\nKey of .. is .....\.", row.decode())
        assert all(gap in text + text for gap in gaps[:-1])
        assert answer.any()


def test_one_of_the_two_recalls_and_text_is_not_changed_by_writing(book):
    source = RecallTraining(steps=4, haystacks=(book[0],), text_share=1.0, **LONG)
    before = source[0].tokens.clone()
    source[1], source[2]
    assert torch.equal(source[0].tokens, before)


def test_rows_with_text_and_kinds_depend_on_seed_and_step_alone(book):
    source = PasskeyTraining(
        steps=9, haystacks=(book[0],), text_share=0.5, needle_shares=dict(updated=0.5), **ONLY_PASSKEY
    )
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(source[5].tokens, again[5].tokens)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(needle_shares=dict(wording=0.1)), "needle wording is for measurement only"),
        (dict(needle_shares=dict(magnet=0.1)), "needle is 'magnet'"),
        (dict(needle_shares=dict(updated=-0.1)), "share of updated is -0.1"),
        (dict(needle_shares=dict(updated=0.6, competing_4=0.5)), "more than 1 in all"),
        (dict(text_share=0.5), "text_share is 0.5 and haystacks are \\[\\]; give both"),
        (dict(haystacks=("x.txt",)), "text_share is 0.0 and haystacks are"),
        (dict(haystacks=("no/such.txt",), text_share=0.5), "no/such.txt does not exist"),
        (dict(text_share=1.5), "text_share is 1.5"),
        (dict(number_share=0.1), "number_share is 0.1 and haystacks are \\[\\]"),
        (dict(number_share=0.6, text_share=0.5, haystacks=("x.txt",)), "number_share is 0.6"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting, message):
    with pytest.raises(InputError, match=message):
        PasskeyTraining(steps=10, **setting)


def test_shares_of_nothing_change_nothing():
    zeros = {name: 0.0 for name in ("competing_4", "updated")}
    plain, zero = PasskeyTraining(steps=9), PasskeyTraining(steps=9, needle_shares=zeros)
    assert all(torch.equal(plain[step].tokens, zero[step].tokens) for step in range(9))
    assert QUESTION.encode() in bytes(plain[8].tokens.flatten().tolist())


def test_natural_text_is_told_by_its_digest(book):
    pattern, text = book
    assert PasskeyTraining(steps=4).digests == {}
    found = PasskeyTraining(steps=4, haystacks=(pattern,), text_share=0.5).digests
    assert found == {"haystacks_sha256": hashlib.sha256(text.encode()).hexdigest()}
