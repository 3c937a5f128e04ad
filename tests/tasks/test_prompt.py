import pytest
from infini.tasks.passkey.needles import FILLER, QUESTION, TASK
from infini.tasks.passkey.prompt import Haystack, build_prompt

from infini.errors import InputError

NEEDLE = "The pass key is 54321. Remember it. 54321 is the pass key."


class Words:
    """A tokenizer that is not bytes: words with their leading space, and a begin-of-text token."""

    def __init__(self):
        self.words, self.prefix_ids = ["<begin>"], [0]

    def encode(self, text):
        pieces = [piece + " " for piece in text.split(" ")]
        pieces[-1] = pieces[-1][:-1]
        for piece in pieces:
            if piece not in self.words:
                self.words.append(piece)
        return [self.words.index(piece) for piece in pieces if piece]

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


def prompt(tokenizer, length, depth, phase=0):
    return build_prompt(tokenizer, length, depth, 54321, Haystack.load("repeat", tokenizer), phase)


@pytest.mark.parametrize("length", [247, 248, 1000, 4096, 65536])
@pytest.mark.parametrize("depth", [0, 0.3, 1])
def test_the_text_is_the_landmark_text_of_exactly_that_length(tokenizer, length, depth):
    found = prompt(tokenizer, length, depth, phase=17)
    filler = length - len(f"{TASK}\n\n{NEEDLE}\n\n{QUESTION}")
    endless = FILLER[17:] + FILLER * (filler // len(FILLER) + 1)
    cut = round(depth * filler)
    expected = f"{TASK}\n{endless[:cut]}\n{NEEDLE}\n{endless[cut:filler]}\n{QUESTION}"
    assert tokenizer.decode(found.ids.tolist()) == expected
    assert len(found.ids) == length


@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_any_tokenizer_gets_its_own_exact_length(depth):
    words = Words()
    for length in (80, 81, 500):
        found = prompt(words, length, depth, phase=5)
        assert len(found.ids) == length
        assert found.ids[0] == 0  # begin-of-text, counted
        assert words.decode(found.ids[found.needle_start : found.needle_end].tolist()) == NEEDLE
        assert words.decode(found.ids.tolist()).endswith("\n" + QUESTION)


def test_the_needle_is_where_it_is_said_to_be(tokenizer):
    starts = []
    for depth in (0, 0.25, 0.5, 0.75, 1):
        found = prompt(tokenizer, 10_000, depth)
        text = tokenizer.decode(found.ids.tolist())
        assert text[found.needle_start : found.needle_end] == NEEDLE
        starts.append(found.needle_start)
    assert starts[0] == len(TASK) + 2
    assert starts[-1] == 10_000 - len(f"{NEEDLE}\n\n{QUESTION}")
    steps = [b - a for a, b in zip(starts, starts[1:])]
    assert max(steps) - min(steps) <= 1


def test_a_needle_is_cut_when_its_first_and_last_token_are_in_two_segments(tokenizer):
    found = prompt(tokenizer, 1000, 0.5)
    start, end = found.needle_start, found.needle_end
    assert not found.cut_by_border(end)
    assert not found.cut_by_border(start)
    assert found.cut_by_border(start + 1)
    assert found.cut_by_border(end - 1)


def test_a_length_that_cannot_hold_the_text_names_the_shortest(tokenizer):
    with pytest.raises(InputError, match="length is 246 tokens.*at least 247"):
        prompt(tokenizer, 246, 0.5)


@pytest.mark.parametrize("depth", [-0.1, 1.1, float("nan")])
def test_a_depth_outside_the_text_is_refused(tokenizer, depth):
    with pytest.raises(InputError, match="depth is .*from 0 to 1"):
        prompt(tokenizer, 1000, depth)


def test_own_text_is_read_in_a_circle(tokenizer, tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("Call me Ishmael. ", encoding="utf-8")
    haystack = Haystack.load(f"text:{file}", tokenizer)
    text = tokenizer.decode(build_prompt(tokenizer, 300, 1, 54321, haystack, phase=8).ids.tolist())
    assert f"{TASK}\nIshmael. Call me Ishmael. Call me " in text


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe\x00"])
def test_a_haystack_without_text_is_refused(tokenizer, tmp_path, content):
    file = tmp_path / "own.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match="own.txt"):
        Haystack.load(f"text:{file}", tokenizer)


def test_an_unknown_haystack_names_the_known_ones(tokenizer):
    with pytest.raises(InputError, match="'essays'.*repeat.*text:FILE"):
        Haystack.load("essays", tokenizer)
