"""Cloze questions: every answer stands in the book, and who does not know the passage is right exactly half the time."""

import random
from collections import Counter

import numpy as np
import pytest
from infini.tasks.booksum.benchmark import summed_choices
from infini.tasks.booksum.cloze import Question, make_questions
from infini.tasks.booksum.names import find_mentions, kinds_of, names_in
from infini.tasks.booksum.prompt import BLANK, ask_blank

from infini.data.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def questions(library):
    return {name: make_questions(text) for name, text in library[0].items()}


def test_every_answer_stands_where_the_book_says(library, questions):
    for name, text in library[0].items():
        assert len(questions[name]) >= 40
        for question in questions[name]:
            passage = question.passage.replace(BLANK, question.answer)
            assert question.passage.count(BLANK) == 1 and text.count(passage) == 1
            assert len(text) - text.index(passage) - len(passage) == question.distance
            # Nor does the passage name the answer, or the other name.
            assert question.answer in question.choices and not any(choice in question.passage for choice in question.choices)


def test_two_questions_offer_the_same_two_names_and_each_is_once_the_answer(questions):
    for found in questions.values():
        for number in {question.pair for question in found}:
            one, other = (question for question in found if question.pair == number)
            assert one.choices == other.choices == tuple(sorted({one.answer, other.answer}))
            assert one.bin == other.bin and (one.kind == "place") == (other.kind == "place")


def test_whoever_only_prefers_names_is_right_exactly_half_the_time_at_every_distance(questions):
    draw = random.Random(0)
    for found in questions.values():
        liking = {name: draw.gauss(0, 5) for question in found for name in question.choices}
        scores = np.array([[liking[name] for name in question.choices] for question in found])
        for bin in {question.bin for question in found}:
            which = [i for i, question in enumerate(found) if question.bin == bin]
            summed = summed_choices(found, scores, which)
            assert summed["right"] == summed["turned"] * 2 == summed["questions"] / 2 and summed["margin"] == pytest.approx(0, abs=1e-9)


def test_a_preference_for_names_hides_nothing_from_pairs_and_margins():
    """By hand: two pairs, a great liking for Ann everywhere; the first pair is known by 0.5 nats, of the second nothing is."""
    found = [Question(f"____ went {pair}.", name, ("Ann", "Bob"), "who", 99, pair) for pair in (0, 1) for name in ("Ann", "Bob")]
    scores = np.array([[-1.0, -9.0], [-1.0, -8.5], [-1.0, -9.0], [-1.0, -9.0]])
    assert summed_choices(found, scores, range(4)) == {"questions": 4, "right": 2.0, "turned": 1.5, "margin": 0.5}
    assert summed_choices(found, scores[::-1].copy(), range(2))["turned"] == 0.5


def test_the_same_seed_gives_the_same_questions_and_fewer_are_spread_over_the_distances(library, questions):
    text = library[0]["road"]
    assert make_questions(text) == questions["road"] != make_questions(text, seed=1)
    few = make_questions(text, most=24)
    counts = Counter(question.bin for question in few)
    assert len(few) == 24 and set(counts) == {question.bin for question in questions["road"]}
    rare = [bin for bin, count in Counter(question.bin for question in questions["road"]).items() if count <= 4]
    assert all(counts[bin] == sum(question.bin == bin for question in questions["road"]) for bin in rare)
    assert [question.pair for question in few] == [i // 2 for i in range(24)]


def test_no_question_of_a_text_without_names():
    assert make_questions("the sea was calm. it rained. nobody came. " * 50) == []
    assert make_questions("") == []


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("So we went on with Mr. Smith, and then Smith said no. Then old Smith cried out, and my friend Smith replied. " * 2, {"Smith": "he"}),
        ("So we went on with Lady Smith, and then Smith said no. Then poor Smith cried out, and my friend Smith replied. " * 2, {"Smith": "she"}),
        ("We met in Paris. He lives in Paris, they say, near Paris. " * 3, {"Paris": "place"}),
        ("On a day in May we met in May, and it was in May. God knows, in July God came. " * 5, {}),  # months and God are no names
        ("Then Time came, and time went, and time again, and we said so, Time said. " * 9, {}),  # a word that is also written small
    ],
)
def test_kinds_of_names_by_hand(text, kinds):
    assert kinds_of(text, find_mentions(text)) == kinds


def test_a_passage_with_more_of_the_name_or_another_title_is_no_question():
    lines = []
    for i in range(12):
        name, other = ("Dance", "Silver") if i % 2 else ("Silver", "Dance")
        lines.append(f"On the evening of day {i} we saw how poor {name} said nothing at all to us.")
        lines.append(f"It was Captain {name} who carried lamp {i} for the others through the rain.")
        lines.append(f"They spoke of day {i} to Long {name} Hook and to nobody else in the town.")
    found = make_questions(" ".join(lines))
    assert {question.answer for question in found} == {"Dance", "Silver"}
    assert not any("Long" in question.passage for question in found)
    titled = {question.pair: "Captain ____" in question.passage for question in found}
    assert set(titled.values()) == {True, False}
    assert all(("Captain ____" in question.passage) == titled[question.pair] for question in found)


def test_a_passage_that_stands_twice_is_no_question():
    lines = [f"On the evening of day {i} we saw how poor {('Dance', 'Silver')[i % 2]} said nothing at all to us." for i in range(12)]
    once, twice = make_questions("\n".join(lines)), make_questions("\n".join(lines + lines[:8]))
    blanks = {line.replace("Dance", BLANK).replace("Silver", BLANK) for line in lines[8:]}
    assert len(once) >= 10 and len(twice) == 4 and {question.passage for question in twice} == blanks


def test_no_passage_of_a_pair_names_the_answer_of_the_other():
    """Whoever reads that Dance spoke to somebody else knows that it was not Dance."""
    both = [f"On the evening of day {i} we saw how {one} said hardly a word to {other} at all." for i in range(9)
            for one, other in (("Dance", "Silver"), ("Silver", "Dance"))]
    assert make_questions("\n".join(both)) == []
    third = [f"On the evening of day {i} we saw how Hands said hardly a word to us at all." for i in range(9)]
    found = make_questions("\n".join(both + third))
    assert all("Hands" in question.choices for question in found) or not found


def test_names_of_a_summary_are_those_of_the_book(library):
    texts, summaries = library
    assert names_in(summaries["sea"], texts["sea"]) == {"Ahab", "Nantucket", "Starbuck"}
    assert names_in(summaries["sea"], texts["moor"]) == set()


def test_both_questions_of_a_pair_offer_the_same_tokens():
    """With a blank before a name and without one its tokens differ, and a preference for some of them would not fall out of a pair."""
    lines = []
    for i in range(60):
        who, quoted = ("Ahab", "Starbuck")[i % 2], f"“{('Ahab', 'Starbuck')[i % 2]} has lamp number {i} on board, as we all know,” said the man."
        lines.append(quoted if i % 3 else f"At hour {i} it rained, said {who} to us all, and we slept.")
    found = make_questions(" ".join(lines))
    assert {question.passage.startswith("“____") for question in found} == {True, False}
    for pair in {question.pair for question in found}:
        one, other = (question for question in found if question.pair == pair)
        for choice in one.choices:
            targets = [bytes(ask_blank(ByteTokenizer(), question.passage, choice).target) for question in (one, other)]
            assert targets[0] == targets[1]
