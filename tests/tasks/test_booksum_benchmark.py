"""The ruler of whole books: what it finds in models that know everything, nothing, or what they were trained on."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from infini.tasks.booksum import benchmark
from infini.tasks.booksum.benchmark import FIRST, LEAD, MEMORY, SILENCED, BooksumSettings, run
from infini.tasks.booksum.cloze import Question, make_questions
from infini.tasks.booksum.likelihood import Silenced, choice_scores, target_nll
from infini.tasks.booksum.measures import copy_rate, entity_recall, first_words, lead, score_summary
from infini.tasks.booksum.pairs import Pair
from infini.tasks.booksum.prompt import Asked, ask_blank, ask_summary
from infini.tasks.booksum.rouge import rouge

from infini import InfiniConfig, InfiniTransformer
from infini.data.tokenizer import ByteTokenizer
from infini.errors import InputError

QUICK = dict(lengths=(2000,), questions=12, samples=1, max_new_tokens=80, wrong_books=2)


def settings(pair_files, **more):
    return BooksumSettings(**pair_files, **{**QUICK, **more})


def of(rows, variant, length=None):
    return [row for row in rows if row["variant"] == variant and row["length"] == length]


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(1)
    config = InfiniConfig.long(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, segment_length=32)
    return InfiniTransformer(config).double().eval()


def test_a_model_that_ignores_the_book(pair_files, book_oracle):
    """Every byte is equally likely: the gap is exactly 0, nothing is right more often than by chance, the likelihood is ln 256 a token."""
    rows, _ = run(book_oracle(knows=False), settings(pair_files, outputs=False, questions=8, wrong_books=1))
    for row in of(rows, MEMORY) + of(rows, SILENCED) + of(rows, FIRST, 64) + of(rows, MEMORY, 2000):
        assert row["nll"] == row["nll_wrong"] and row["nll"] == pytest.approx(row["summary_tokens"] * math.log(256), rel=1e-5)
        for cell in row["cloze"]:
            # All choices of one length are equally likely, a shorter one is likelier: half right, whatever the lengths.
            assert cell["right"] == cell["questions"] / 2 and cell["turned"] == cell["questions"] / 4
            assert cell["margin"] == pytest.approx(0, abs=1e-3)


def test_a_model_that_has_read_the_book(pair_files, book_oracle, library):
    texts, summaries = library
    rows, data = run(book_oracle(), settings(pair_files))
    assert [row["pair"] for row in of(rows, MEMORY)] == list(texts) and data["books"] == 3
    for row in of(rows, MEMORY):
        assert row["input_tokens"] == len(texts[row["book"]].encode()) and row["reference"] == summaries[row["book"]]
        assert row["nll_wrong"] - row["nll"] > 3 * row["summary_tokens"]
        assert sum(cell["questions"] for cell in row["cloze"]) == 12
        assert all(cell["right"] == cell["questions"] == 2 * cell["turned"] and cell["margin"] > 5 for cell in row["cloze"])
        assert row["beyond"]["tokens"] == 128 and 0 < row["beyond"]["right"] == row["beyond"]["questions"] <= 12
        for output, decoding in zip(row["outputs"], ("greedy", "sampled"), strict=True):
            assert output["text"] == summaries[row["book"]] and output["ended"] and output["decoding"] == decoding
            assert output["geometric_mean"] == output["matched"] == output["rouge1"] == pytest.approx(1)
            assert output["entity_recall"] == 1 and output["copy_rate"] < 0.2
    for row in of(rows, SILENCED) + of(rows, SILENCED, 2000):  # silenced, it knows nothing, however much it reads
        assert row["nll"] == row["nll_wrong"] and all(cell["right"] == cell["questions"] / 2 for cell in row["cloze"])
        assert row["outputs"][0]["text"] != summaries[row["book"]]
    for row in of(rows, LEAD):
        assert texts[row["book"]].startswith(row["outputs"][0]["text"]) and row["nll"] is None and row["outputs"][0]["copy_rate"] == 1


def test_the_wrong_books_are_others_of_the_batch(pair_files, book_oracle):
    """Three books: every right summary is unlikely after both others, so the mean over two is that over one."""
    quick = dict(outputs=False, lengths=(), questions=0, knockout=False)
    one, two = (of(run(book_oracle(), settings(pair_files, wrong_books=n, **quick))[0], MEMORY) for n in (1, 2))
    assert [row["nll_wrong"] for row in one] == pytest.approx([row["nll_wrong"] for row in two], rel=0.3)
    assert all(row["nll_wrong"] > 5 * row["nll"] for row in one + two)


def test_likelihood_is_that_of_one_pass_over_everything(tiny):
    book, other = np.arange(100) % 7, np.arange(90) % 5
    asked = [Asked(np.array([1, 2, 3]), np.array([4, 5, 6, 7])), Asked(np.array([9]), np.array([8, 7])), Asked(np.array([3, 3]), np.arange(40))]
    _, state = tiny(torch.tensor(np.stack([book[:90], other])), keep="none")
    found = target_nll(tiny, state.select(torch.tensor([0, 1, 1])), asked, rows=2)
    for text, one, nll in zip((book[:90], other, other), asked, found, strict=True):
        ids = torch.tensor(np.concatenate([text, *one]))[None]
        with torch.no_grad():
            logits, _ = tiny(ids[:, :-1])
        losses = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none")
        assert nll == pytest.approx(float(losses[-len(one.target) :].sum()), rel=1e-9)


@pytest.mark.parametrize("silenced", [False, True])
def test_choices_are_scored_as_targets_are(tiny, library, silenced):
    """Two ways to one number: the choices of a question after one reading of it, and each as a target with the whole question before it."""
    reader, text = Silenced(tiny) if silenced else tiny, library[0]["road"]
    questions = make_questions(text, most=6)
    _, state = reader(torch.tensor([list(text[:1500].encode())]), keep="none")
    scores = choice_scores(reader, state, ByteTokenizer(), questions, rows=4, piece=50)
    asked = [ask_blank(ByteTokenizer(), question.passage, choice) for question in questions for choice in question.choices]
    found = target_nll(reader, state.select(torch.zeros(len(asked), dtype=torch.long)), asked)
    assert scores.shape == (6, 2) and np.allclose(scores.flatten(), -np.array(found), rtol=1e-6)


def test_silenced_is_another_model(tiny):
    ids = torch.tensor([list(range(100))])
    loud, quiet = tiny(ids)[0], Silenced(tiny)(ids)[0]
    assert torch.equal(quiet, tiny(ids, memory=False)[0]) and not torch.allclose(loud, quiet)


def test_a_length_is_what_a_shorter_book_would_give(tiny, pair_files, tmp_path):
    """After the first 2,000 tokens everything is as if the book had ended there; and what stands in the same batch changes nothing."""
    quick = dict(outputs=False, knockout=False, piece=300)
    at = of(run(tiny, settings(pair_files, **quick))[0], MEMORY, 2000)
    cut = [json.loads(line) for line in Path(pair_files["books"][0]).read_text().splitlines()]
    for row in cut:
        row["text"] = row["text"].encode()[:2000].decode(errors="ignore")
    (tmp_path / "cut.jsonl").write_text("\n".join(map(json.dumps, cut)))
    short = {**pair_files, "books": (str(tmp_path / "cut.jsonl"),)}
    whole = of(run(tiny, settings(short, **{**quick, "piece": 77}))[0], MEMORY)
    assert len(at) == len(whole) == 3
    for one, other in zip(at, whole, strict=True):
        assert one["input_tokens"] >= other["input_tokens"] >= 1998
        if one["input_tokens"] == other["input_tokens"]:
            assert one["nll"] == pytest.approx(other["nll"], rel=1e-6) and one["cloze"] == [
                {**cell, "margin": pytest.approx(cell["margin"], rel=1e-4)} for cell in other["cloze"]
            ]
    assert any(one["input_tokens"] == other["input_tokens"] for one, other in zip(at, whole, strict=True))


def test_sampled_outputs_follow_the_seed(tiny, pair_files):
    quick = dict(lengths=(), questions=0, knockout=False, max_new_tokens=8, samples=2)
    one, again, other = (of(run(tiny, settings(pair_files, **quick, seed=seed))[0], MEMORY) for seed in (0, 0, 5))
    texts = [[[output["text"] for output in row["outputs"]] for row in rows] for rows in (one, again, other)]
    assert texts[0] == texts[1] and [row[0] for row in texts[0]] == [row[0] for row in texts[2]] and texts[0] != texts[2]
    assert all(len({*row}) == 3 for row in texts[0]) and [output["seed"] for output in one[0]["outputs"]] == [None, 0, 1]


def test_rouge_by_hand():
    """7 and 8 words; "captains" and "captain" have one stem. Common: the, captain, sees, the, whale = 5; pairs: the-captain,
    captain-sees, the-whale = 3; longest common subsequence: the captain sees the whale = 5."""
    found = rouge("The captains sees at last the whale!", "the captain sees it and then the whale")
    assert found["rouge1"] == pytest.approx(2 * 5 / (7 + 8)) and found["rouge2"] == pytest.approx(2 * 3 / (6 + 7))
    assert found["rougeL"] == pytest.approx(2 * 5 / (7 + 8))
    assert found["geometric_mean"] == pytest.approx((10 / 15 * 6 / 13 * 10 / 15) ** (1 / 3))
    assert rouge("", "a whale")["geometric_mean"] == 0


def test_length_pays_nobody():
    reference, book = "the whale sinks the ship", "Some book."
    right = score_summary("the whale sinks the ship", reference, book)
    longer = score_summary("the whale sinks the ship and much more is told that no reference has", reference, book)
    assert right["matched"] == longer["matched"] == pytest.approx(1) and longer["geometric_mean"] < 0.8
    assert longer["words"] == 14 and longer["copy_rate"] == 0 and longer["entity_recall"] is None


def test_measures_by_hand():
    assert first_words(" a b  c ", 2) == " a b" and first_words("a", 9) == "a" and first_words("", 2) == ""
    assert copy_rate("one two three four", "one two three four") is None  # fewer than five words
    assert copy_rate("A one two three four five, six", "zero one two THREE four-five. Seven") == 1 / 3
    assert entity_recall("nobody", "It rains.", "It rains. It snows.") is None
    assert lead("One two three. Four five. Six.\n\nSeven.", 5) == "One two three. Four five."


def test_summaries_are_cut_and_ended():
    asked = ask_summary(ByteTokenizer(), "Short.", most=None)
    assert bytes(asked.target) == b"Short.\n###" and bytes(asked.prompt).startswith(b"\n\n###")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"batch_size": 1}, "batch_size is 1; it must be at least 2"),
        ({"lengths": (20, 10)}, "lengths are .20, 10.; they must grow"),
        ({"questions": -1}, "questions is -1"),
        ({"temperature": 0.0}, "temperature is 0.0 and top_p 0.95"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_mistakes(pair_files, asked, message):
    with pytest.raises(InputError, match=message):
        settings(pair_files, **asked)


def test_books_that_tell_nothing(pair_files, book_oracle, tmp_path):
    with pytest.raises(InputError, match="the book 'sea' has .* tokens, less than a segment"):
        run(book_oracle(segment_length=10**6), settings(pair_files))
    line = Path(pair_files["pairs"][0]).read_text().splitlines()[0]
    (tmp_path / "one.jsonl").write_text(line)
    with pytest.raises(InputError, match="'sea' is the only book"):
        run(book_oracle(), settings({**pair_files, "pairs": (str(tmp_path / "one.jsonl"),)}))


def test_a_batch_never_holds_a_book_alone(pair_files, book_oracle):
    rows, _ = run(book_oracle(), settings(pair_files, outputs=False, batch_size=2))
    assert all(row["nll_wrong"] > row["nll"] for row in of(rows, MEMORY)) and len(of(rows, MEMORY)) == 3


def test_without_the_library_of_rouge_nothing_is_read(pair_files, book_oracle, monkeypatch):
    from infini.tasks.booksum import rouge as door

    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    door._scorer.cache_clear()
    oracle = book_oracle()
    with pytest.raises(InputError, match="pip install 'infini-attention.summaries.'"):
        run(oracle, settings(pair_files))
    assert oracle.calls == 0
    door._scorer.cache_clear()


def test_the_right_book_is_never_among_the_wrong_ones(pair_files, book_oracle, library):
    """After another book the oracle finds all but the first letters as likely as any byte, ln 256 = 5.5 nats each."""
    sizes = sorted(len(text.encode()) for text in library[0].values())
    quick = dict(outputs=False, questions=0, knockout=False, wrong_books=1, lengths=(sizes[1],))  # beyond it there is one book
    rows, _ = run(book_oracle(), settings(pair_files, **quick))
    found = of(rows, MEMORY) + of(rows, MEMORY, sizes[1])
    assert len(found) == 4 and all(row["nll"] < 0.1 * row["summary_tokens"] < 5 * row["summary_tokens"] < row["nll_wrong"] for row in found)


def test_questions_are_those_of_the_book_however_many_summaries_it_has(pair_files, book_oracle):
    with open(pair_files["pairs"][0], "a") as file:
        file.write(json.dumps({"id": "sea", "summary": "Another one."}) + "\n")
    rows, _ = run(book_oracle(), settings(pair_files, outputs=False, knockout=False, lengths=(), questions=4))
    counts = [(row["book"], sum(cell["questions"] for cell in row["cloze"]), row["beyond"] is None) for row in of(rows, MEMORY)]
    assert sorted(counts) == [("moor", 4, False), ("road", 4, False), ("sea", 0, True), ("sea", 4, False)]


def test_sampling_keeps_to_the_likeliest(tiny, pair_files):
    quick = dict(lengths=(), questions=0, knockout=False, max_new_tokens=8, top_p=1e-6)
    for row in of(run(tiny, settings(pair_files, **quick))[0], MEMORY):
        assert len({output["text"] for output in row["outputs"]}) == 1


def test_beyond_local_reach_are_whole_pairs_measured_in_tokens(monkeypatch):
    """Two tokens a letter and a reach of 2 x 10 tokens: 9 letters lie within, 11 beyond; a pair of one of each is left out."""
    questions = [Question("____ went.", name, ("Ann", "Bob"), "who", distance, pair)
                 for pair, distances in enumerate(((9, 11), (11, 12))) for name, distance in zip(("Ann", "Bob"), distances)]  # fmt: skip
    reader = SimpleNamespace(config=SimpleNamespace(segment_length=10, num_hidden_layers=1))
    shelf = benchmark._Shelf({"a": np.arange(80)}, {"a": [Pair("a", "a", "x" * 40, "")]}, BooksumSettings(pairs=()), ByteTokenizer())
    monkeypatch.setattr(benchmark, "make_questions", lambda *given: questions)
    monkeypatch.setattr(benchmark, "choice_scores", lambda *given: np.zeros((4, 2)))
    found = benchmark._cloze(reader, None, shelf, "a", 80)
    assert (found["beyond"]["tokens"], found["beyond"]["questions"]) == (20, 2) and found["cloze"][0]["questions"] == 4


def test_whole_words_are_copied():
    assert copy_rate("one two three four five", "bone two three four fives") == 0
