import json
import re

import numpy as np
import pytest
from infini.tasks.passkey.benchmark import PasskeyBenchmark, run
from infini.tasks.passkey.keys import is_held_out
from infini.tasks.passkey.needles import NEEDLES, WORDINGS, needle_kind
from infini.tasks.passkey.prompt import Haystack, build_prompt

from infini.errors import InputError


class Words:
    """A tokenizer that is not bytes: pieces of three characters, and a begin-of-text token."""

    def __init__(self):
        self.pieces, self.prefix_ids = ["<begin>"], [0]

    def encode(self, text):
        pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
        self.pieces += sorted(set(pieces) - set(self.pieces))
        return [self.pieces.index(piece) for piece in pieces]

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


def draw(name, seed=0, key=54321):
    return needle_kind(name).draw(np.random.default_rng(seed), key, True)


def prompt(tokenizer, name, length=1500, depth=0.5, seed=0, key=54321):
    haystack = Haystack.load("repeat", tokenizer, needle_kind(name).filler)
    quiz = draw(name, seed, key)
    return quiz, build_prompt(tokenizer, length, depth, key, haystack, seed, quiz)


@pytest.mark.parametrize("name", NEEDLES)
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("words", [False, True])
def test_the_length_is_exact_and_everything_is_where_it_is_said_to_be(tokenizer, name, depth, words):
    tokenizer = Words() if words else tokenizer
    for seed in range(8):
        quiz, found = prompt(tokenizer, name, 1500 + seed, depth, seed)
        ids = found.ids.tolist()
        assert len(ids) == 1500 + seed
        assert tokenizer.decode(ids[found.needle_start : found.needle_end]) == quiz.needle
        decoys = [tokenizer.decode(ids[start:end]) for start, end in found.decoys]
        assert decoys == [decoy.text for decoy in quiz.decoys]
        text = tokenizer.decode(ids)
        assert text.removeprefix("<begin>").startswith(quiz.task + "\n")
        assert text.endswith("\n" + quiz.question)
        said = [quiz.needle, *decoys]
        assert all(text.count(f"\n{statement}\n") == 1 for statement in said)
        filler = text.removesuffix("\n" + quiz.question).partition(quiz.task + "\n")[2]
        for statement in said:
            filler = filler.replace(f"\n{statement}\n", "")
        own = needle_kind(name).filler
        assert filler in own * (len(filler) // len(own) + 2)  # goes on where it was interrupted


@pytest.mark.parametrize("name", NEEDLES)
def test_the_depth_is_the_share_of_filler_before_the_needle(tokenizer, name):
    for seed in range(5):
        quiz, found = prompt(tokenizer, name, 40_000, 0.3, seed)
        other = len(quiz.task + quiz.needle + quiz.question) + 5 + 1
        other += sum(len(decoy.text) + 2 for decoy in quiz.decoys)
        earlier = sum(end - start + 2 for start, end in found.decoys if start < found.needle_start)
        before = found.needle_start - len(quiz.task) - 2 - earlier
        assert before == pytest.approx(0.3 * (40_000 - other), abs=2)


@pytest.mark.parametrize(("name", "count"), [("competing_4", 4), ("competing_8", 8)])
def test_competing_keys_belong_to_different_people_and_stand_anywhere(tokenizer, name, count):
    places, names = [], set()
    for seed in range(60):
        quiz, found = prompt(tokenizer, name, 4000, 0.5, seed)
        text = tokenizer.decode(found.ids.tolist())
        said = re.findall(r"\nThe pass key of ([A-Z]+) is (\d{5})\. Remember it\. \2 is the pass key of \1\.\n", text)
        assert len(dict(said)) == len(set(dict(said).values())) == count
        who = quiz.question.split()[-2]
        assert quiz.question == f"What is the pass key of {who}? The pass key of {who} is"
        assert dict(said)[who] == "54321"
        assert all(is_held_out(int(key)) for key in dict(said).values() if key != "54321")
        names.add(who)
        places += [start / 4000 for start, _ in found.decoys]
    assert len(names) > 12
    histogram = np.histogram(places, bins=5, range=(0, 1))[0]
    assert histogram.min() > 0.6 * len(places) / 5


@pytest.mark.parametrize("name", ["competing_8", "updated"])
def test_no_two_keys_of_a_prompt_are_equal(name):
    for seed in range(300):  # of three digits there are but 90 held-out keys
        quiz = draw(name, seed, key=int(np.arange(100, 1000)[is_held_out(np.arange(100, 1000))][0]))
        keys = [re.search(r"\d+", text)[0] for text in (quiz.needle, *(decoy.text for decoy in quiz.decoys))]
        assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("depth", [0.0, 0.1, 1.0])
def test_an_updated_key_is_said_before_and_counts_no_more(tokenizer, depth):
    starts = []
    for seed in range(40):
        quiz, found = prompt(tokenizer, "updated", 4000, depth, seed)
        ((start, end),) = found.decoys
        assert end < found.needle_start
        old = re.search(r"\d+", quiz.decoys[0].text)[0]
        assert len(old) == 5 and old != "54321" and is_held_out(int(old))
        assert "has changed" in quiz.needle and "54321" in quiz.needle and old not in quiz.needle
        starts.append(start)
    assert (len(set(starts)) == 1) == (depth == 0)
    if depth == 1:  # anywhere before it
        assert min(starts) < 800 and max(starts) > 2800


def test_ruler_is_rulers_text(tokenizer):
    # The template as RULER prints it for one key, one value and one query, filled by hand.
    name = re.search("for ([a-z]+-[a-z]+) is", draw("niah_single_1", 3).needle)[1]
    quiz, found = prompt(tokenizer, "niah_single_1", 1500, 0.0, 3, key=7654321)
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    begin = (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n\n"
        f"One of the special magic numbers for {name} is: 7654321.\n"
    )
    end = (
        f"\nWhat is the special magic number for {name} mentioned in the provided text? "
        f"The special magic number for {name} mentioned in the provided text is"
    )
    filler = (noise[3:] + noise * 20)[: 1500 - len(begin) - len(end)]
    assert tokenizer.decode(found.ids.tolist()) == begin + filler + end
    names = {draw("niah_single_1", seed).question for seed in range(200)}
    assert len(names) > 190


def test_every_wording_occurs_and_none_is_like_the_trained_ones(tokenizer):
    drawn = {draw("wording", seed, 12345).question for seed in range(100)}
    assert drawn == {question for _, question in WORDINGS}
    for statement, question in WORDINGS:
        assert statement.count("{key}") == 2 and "pass key" not in statement + question
    assert not NEEDLES["wording"].trained
    assert all(kind.trained for name, kind in NEEDLES.items() if name != "wording")


def test_the_passkey_draws_nothing_more():
    # More draws would change every prompt that follows.
    random = np.random.default_rng(0)
    needle_kind("passkey").draw(random, 12345, True)
    assert random.random() == np.random.default_rng(0).random()


@pytest.fixture
def reader(oracle):
    """An oracle for all kinds: what is said last (or first) of what is asked for."""

    class Reader(oracle):
        def __init__(self, last=True):
            super().__init__()
            self.last = last

        def _next(self, text):
            asked = [q for q in self.questions if q in text]
            before, _, written = text.rpartition(max(asked, key=text.rindex, default="\0"))
            key = self.known(before)
            said = f" {key}."
            return said[len(written)] if asked and len(written) < len(said) else "?"

        def known(self, before):
            numbers = re.findall(self.pattern, before)
            return numbers[-1 if self.last else 0] if numbers else "?"

    return Reader


@pytest.mark.parametrize(("last", "score"), [(True, 1.0), (False, 0.0)])
def test_the_last_value_counts(reader, tokenizer, tmp_path, last, score):
    model = reader(last)
    model.questions, model.pattern = ["What is the pass key? The pass key is"], r"key is (?:now )?(\d+)"
    settings = PasskeyBenchmark(lengths=(600,), depths=(0.0, 1.0), samples=4, needle="updated", batch_size=3)
    for row in run(model, tokenizer, settings, tmp_path):
        assert row["exact_match"] == score
        assert row["needle"] == "updated"


@pytest.mark.parametrize("name", NEEDLES)
def test_the_benchmark_asks_every_kind(oracle, tokenizer, tmp_path, name):
    settings = PasskeyBenchmark(lengths=(1300,), depths=(0.5,), samples=20, batch_size=7, needle=name)
    assert settings.digits == (7 if name == "niah_single_1" else 5)
    (row,) = run(oracle(segment_length=100), tokenizer, settings, tmp_path)
    assert row["needle"] == name and row["samples"] == 20
    (cell,) = [json.loads(path.read_text()) for path in (tmp_path / "cells").iterdir()]
    cut = 0
    for sample in cell["samples"]:
        assert is_held_out(sample["key"]) and len(str(sample["key"])) == settings.digits
        start, end = sample["needle"]
        assert sample["border_cut"] == (start // 100 != (end - 1) // 100)
        if name == "phrase":
            assert 0 <= len(sample["decoys"]) <= 3
        else:
            assert len(sample["decoys"]) == {"competing_4": 3, "competing_8": 7, "updated": 1}.get(name, 0)
        cut += sample["border_cut"]
    assert row["border_cut"] == cut
    kinds_of_question = {"competing_4": 5, "competing_8": 5, "wording": 3, "niah_single_1": 18, "phrase": 20}
    assert len({sample["question"] for sample in cell["samples"]}) >= kinds_of_question.get(name, 1)


def test_a_folder_made_before_there_were_kinds_goes_on(oracle, tokenizer, tmp_path):
    settings = PasskeyBenchmark(lengths=(400,), depths=(0.5,))
    run(oracle(), tokenizer, settings, tmp_path)
    identity = json.loads((tmp_path / "run.json").read_text())
    assert set(identity) == {
        *("task", "version", "lengths", "depths", "samples", "seed", "digits", "haystack", "batch_size", "piece"),
        *("haystack_sha256", "checkpoint_sha256", "device"),
    }
    assert identity["version"] == 1 and identity["digits"] == 5
    other = PasskeyBenchmark(lengths=(400,), depths=(0.5,), needle="updated")
    with pytest.raises(InputError, match="its needle is None, here it is updated"):
        run(oracle(), tokenizer, other, tmp_path)


def test_a_length_too_short_for_the_longest_sample_is_found_before_any_work(oracle, tokenizer, tmp_path):
    model = oracle()
    settings = PasskeyBenchmark(lengths=(700,), depths=(0.5,), samples=5, needle="competing_8")
    with pytest.raises(InputError, match=r"length is 700 tokens.*at least 8\d\d"):
        run(model, tokenizer, settings, tmp_path / "out")
    assert model.calls == 0 and not (tmp_path / "out").exists()


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(InputError, match="needle is 'magnet'; use one of passkey, competing_4.*niah_single_1"):
        PasskeyBenchmark(needle="magnet")


@pytest.mark.parametrize("name", ["passkey", "competing_4", "updated"])
def test_other_digit_counts(oracle, tokenizer, tmp_path, name):
    settings = PasskeyBenchmark(lengths=(900,), depths=(0.5,), samples=3, needle=name, digits=9)
    run(oracle(), tokenizer, settings, tmp_path)
    (cell,) = [json.loads(path.read_text()) for path in (tmp_path / "cells").iterdir()]
    assert all(len(str(sample["key"])) == 9 for sample in cell["samples"])
