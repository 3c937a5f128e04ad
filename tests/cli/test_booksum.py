"""From books and summaries to a table, a picture and a page: `infini train task=booksum`, `infini booksum`, `infini summarize`."""

import json
import random
import re
import shutil
from html.parser import HTMLParser

import pytest
from infini.tasks.booksum.prompt import END, SUMMARY_PROMPT

from infini.cli.compose import compose
from infini.cli.main import main
from infini.cli.summarize import _require_text
from infini.errors import InputError
from infini.report.booksum import _by_distance, booksum_table, cloze, gap, rows_at, score, variants, worth
from infini.report.booksum_page import booksum_page
from infini.report.booksum_sweep import books_table
from infini.report.render import render
from infini.report.sweep import Run, Setting, Sweep

SHAPE = ["model.hidden_size=16", "model.num_hidden_layers=1", "model.segment_length=32"]
LEAVE = ["~task.min_segments", "~task.max_segments", "~task.tokens_per_batch"]
FILES = ["pairs=[summaries.jsonl]", "books=[books.jsonl]"]
TASK = ["task=booksum", *(f"task.{file}" for file in FILES), "task.rows=2", "task.segments=8", "task.cloze_share=0.5", "task.book_tokens=2000"]
QUICK = ["device=cpu", "lengths=[2000]", "questions=8", "max_new_tokens=8", "wrong_books=1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three books, and a model that has met them."""
    folder, books, summaries = tmp_path_factory.mktemp("made"), [], []
    for book, people in (("sea", ("Ahab", "Starbuck", "Stubb")), ("moor", ("Cathy", "Linton", "Heathcliff")), ("road", ("Pip", "Joe", "Magwitch"))):
        draw = random.Random(book)
        lines = [f"On day {i} of the long voyage we all saw that {draw.choice(people)} said he had lost hat number {i}." for i in range(40)]
        books.append({"id": book, "text": "\n".join(lines)})
        summaries.append({"id": book, "summary": f"{people[0]} <b>meets</b> {people[1]} & nobody else."})
    for name, rows in (("books", books), ("summaries", summaries)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "book.txt").write_text(books[0]["text"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "debug=tiny", *SHAPE, *TASK, *LEAVE, "output=runs/books"]) == 0
    return folder


@pytest.fixture
def trained(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_from_training_to_a_page(trained, capsys):
    training = json.loads((trained / "runs/books/record.json").read_text())
    assert training["data"]["class"].endswith("BookSummaries") and len(training["data"]["pairs_sha256"]) == 64
    assert main(["booksum", "checkpoint=runs/books/model", *FILES, *QUICK, "output=out"]) == 0
    printed = capsys.readouterr().out
    record = json.loads((trained / "out/record.json").read_text())
    assert record["kind"] == "booksum" and record["seeds"] == {"text": 0} and record["data"]["runs/books/model"]["pairs_read"] == 3
    assert [variant for _, variant in variants(record)] == ["first segment only", "whole model", "memory silenced", "first sentences"]
    table = (trained / "out/record.md").read_text()
    assert table in printed and "| runs/books/model | whole model | 2,000 | 3 |" in table
    assert table.count("memory silenced | all") >= 2 and "What the memory is worth" in table
    assert (trained / "out/record.png").read_bytes()[:4] == b"\x89PNG"
    before = {name: (trained / "out" / name).read_bytes() for name in ("record.md", "record.png", "record.html")}
    render(trained / "out/record.json")
    assert all((trained / "out" / name).read_bytes() == content for name, content in before.items())

    page = Tags(before["record.html"].decode())
    assert "Ahab <b>meets</b> Starbuck & nobody else." in page.text and "b" not in {tag for tag, _ in page.tags}
    assert sum(tag == "section" for tag, _ in page.tags) == 3 and "first sentences" in page.text
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in page.tags}
    names = {name for _, attributes in page.tags for name in attributes}
    assert "src" not in names and not any(name.startswith("on") for name in names)
    assert all(attributes.get("href", "#").startswith("#") for _, attributes in page.tags)


def test_two_models_and_all_models_of_a_sweep(trained):
    assert main(["train", "debug=tiny", "model=transformer_xl", *SHAPE, *TASK, *LEAVE, "output=runs/xl"]) == 0
    models = "checkpoint=[runs/books/model,runs/xl/model]"
    assert main(["booksum", models, *FILES, *QUICK, "outputs=false", "output=both"]) == 0
    record = json.loads((trained / "both/record.json").read_text())
    assert {model for model, _ in variants(record)} == {"runs/books/model", "runs/xl/model", "-"}
    assert list(variants(record)).count(("-", "first sentences")) == 1
    assert main(["booksum", "runs=runs", *FILES, *QUICK, "outputs=false", "output=test"]) == 0
    one = json.loads((trained / "runs/xl/test/record.json").read_text())
    alone = [row["nll"] for row in one["rows"] if row["variant"] == "whole model"]
    assert alone == [row["nll"] for row in record["rows"] if row["variant"] == "whole model" and row["model"] == "runs/xl/model"]


def test_a_sweep_pools_the_seeds_of_a_row(trained, capsys):
    again = ["train", "-m", "debug=tiny", "seed=0,1", *SHAPE, *TASK, *LEAVE, "output=runs/sweep"]
    assert main(again) == 0
    assert main(["booksum", "runs=runs/sweep", *FILES, *QUICK, "outputs=false", "knockout=false", "output=test"]) == 0
    assert main(["report", "runs/sweep"]) == 0
    table = (trained / "runs/sweep/sweep.md").read_text().partition("## test")[2]
    assert re.search(r"^\| 2 of 2 \| 3 \| -?0", table, re.M)


def test_summarize_prints_what_a_session_writes(trained, capsys):
    from infini.data.tokenizer import ByteTokenizer
    from infini.model import InfiniTransformer
    from infini.session import StreamingSession

    session = StreamingSession(InfiniTransformer.from_pretrained(trained / "runs/books/model"))
    session.feed(list((trained / "book.txt").read_bytes() + SUMMARY_PROMPT.encode()))
    expected = ByteTokenizer().decode([int(token) for token in session.generate(12)]).partition(END)[0] + "\n"
    asked = ["summarize", "checkpoint=runs/books/model", "input=book.txt", "device=cpu", "temperature=0", "max_new_tokens=12", "piece=100"]
    for session in ([], ["session=book.st"], ["session=book.st"]):  # kept, then begun from what was kept
        capsys.readouterr()
        assert main([*asked, *session]) == 0
        out, err = capsys.readouterr()
        assert out == expected and "reading book.txt" not in out
    assert "at once, from the saved session" in err


def test_the_prompt_of_the_command_is_that_of_training():
    config = compose("summarize", ["input=x"])
    assert (config["prompt"], config["stop"]) == (SUMMARY_PROMPT, END)
    assert (config["temperature"], config["top_p"], config["max_new_tokens"]) == (0.5, 0.95, 1024)  # arXiv 2404.07143


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["summarize", "input=nowhere.txt"], "input is 'nowhere.txt'; there is no such file"),
        (["summarize", "input=/"], "input is '/', which is no regular file; give a text file on a disk"),
        (["summarize", "input=latin.txt"], "latin.txt is not UTF-8 text .*near byte 22.*iconv"),
        (["summarize", "input=cut.txt"], "cut.txt is not UTF-8 text .it ends inside a character"),
        (["summarize", "input=short.txt"], "short.txt has 12 tokens, less than a segment of this model .32."),
        (["summarize", "input=empty.txt"], "'empty.txt' is empty"),
        (["summarize", "input=book.txt", "prompt=Tell"], "prompt is 'Tell'; it must begin with a line end"),
        (["summarize"], "input is missing"),
        (["booksum", "books=[books.jsonl]"], "pairs is missing"),
        (["booksum", *FILES, "batchsize=3"], "nothing reads batchsize; did you mean batch_size"),
        (["booksum", *FILES, "key=title"], "books.jsonl has no column 'title'; its columns are id, text"),
        (["booksum", "pairs=[more.jsonl]", "books=[books.jsonl]"], "the summary of 'lost' has no book"),
        (["booksum", "pairs=[summaries.jsonl]", "books=[tiny.jsonl]"], "the book 'sea' has 3 tokens, less than a segment .32."),
    ],
)
def test_mistakes(trained, capsys, asked, message):
    (trained / "latin.txt").write_bytes(b"On the evening it was " + b"\xe9t\xe9")
    (trained / "cut.txt").write_bytes(b"plain" * 99 + "é".encode()[:1])
    (trained / "short.txt").write_text("Twelve bytes")
    (trained / "empty.txt").touch()
    (trained / "more.jsonl").write_text('{"id": "lost", "summary": "x"}')
    (trained / "tiny.jsonl").write_text("\n".join(json.dumps({"id": name, "text": "Oh."}) for name in ("sea", "moor", "road")))
    assert main([*asked, "checkpoint=runs/books/model", "device=cpu"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error


def row(pair, length, **more):
    return {"model": "m", "variant": "whole model", "pair": pair, "book": pair, "length": length, "outputs": [], "cloze": [], "beyond": None, **more}


def test_the_place_that_is_no_text_is_counted_from_the_beginning(tmp_path):
    path = tmp_path / "long.txt"
    path.write_bytes(b"a" * (2**20 + 7) + b"\xff" + b"a" * 9)
    with pytest.raises(InputError, match="near byte 1,048,583"):
        _require_text(path)


def test_gap_and_scores_by_hand():
    rows = [
        row("a", None, input_tokens=5, nll=10.0, nll_wrong=13.0, summary_tokens=10),
        row("b", None, input_tokens=5, nll=20.0, nll_wrong=21.0, summary_tokens=30),
    ]
    middle, low, high = gap(rows, per_token=False)
    assert middle == 2.0 and (low, high) == (1.0, 3.0)  # a draw of books is a twice, b twice or both
    middle, low, high = gap(rows, per_token=True)
    assert middle == pytest.approx(4 / 40) and (low, high) == (pytest.approx(1 / 30), pytest.approx(3 / 10))
    rows[0]["outputs"] = [{"decoding": "greedy", "rouge1": 0.5, "entity_recall": None}, {"decoding": "sampled", "rouge1": 0.1, "entity_recall": 1.0}]
    rows[1]["outputs"] = [{"decoding": "greedy", "rouge1": 0.3, "entity_recall": 0.5}]
    assert score(rows, "rouge1", "greedy")[0] == 0.4 and score(rows, "entity_recall", "greedy")[0] == 0.5 and score(rows, "rouge1", "x") is None
    rows[0]["cloze"] = [{"from": 512, "questions": 4, "right": 3.0, "turned": 2.0, "margin": 8.0}]
    rows[1]["beyond"] = {"tokens": 99, "questions": 8, "right": 4.0, "turned": 3.0, "margin": -4.0}
    near, far = cloze(rows, 512), cloze(rows)
    assert (near["questions"], near["accuracy"][0], near["turned"][0], near["margin"][0]) == (4, 0.75, 1.0, 2.0)
    assert (far["questions"], far["accuracy"][0], far["turned"][0], far["margin"][0]) == (8, 0.5, 0.75, -0.5)


def test_books_with_two_summaries_are_resampled_as_one():
    rows = [{**row(f"a{i}", None, nll=0.0, nll_wrong=float(i), summary_tokens=1), "book": "a"} for i in range(5)]
    assert gap(rows, per_token=True) == (2.0, None, None)  # one book tells nothing of others
    table = [row("b", None, nll=0.0, nll_wrong=2.0, summary_tokens=5)]
    assert gap(rows + table, per_token=True) == (1.2, pytest.approx(2 / 5), 2.0)


def test_a_few_books_that_agree_are_no_certainty():
    """One book, 7 of 10 pairs: Wilson's interval of 7 of 10 by hand (z = 1.96); two books that agree have the same, of 14 of 20."""
    one = [{**row("a", None), "beyond": {"tokens": 9, "questions": 20, "right": 10.0, "turned": 7.0, "margin": 1.0}}]
    assert cloze(one)["turned"] == pytest.approx((0.7, 0.39677, 0.89221), abs=1e-4)
    assert cloze(one)["margin"] == (0.05, None, None)
    assert cloze(one + [{**one[0], "book": "b"}])["turned"] == pytest.approx((0.7, 0.48103, 0.85452), abs=1e-4)
    assert cloze(one + one)["margin"] == (0.05, None, None)  # two seeds of one book


def test_what_a_memory_is_worth_by_hand():
    def side(nlls, turned):
        return [row(book, None, nll=nll, nll_wrong=10.0, summary_tokens=10, beyond={"questions": 8, "right": 4.0, "turned": t, "margin": 0.0})
                for book, nll, t in zip("abc", nlls, turned)]

    found = worth(side((4.0, 6.0, 5.0), (4, 3, 4)), side((9.0, 9.0, 8.0), (2, 3, 1)))
    assert found["gap"][0] == pytest.approx((5 + 3 + 3) / 30) and found["turned"][0] == pytest.approx(5 / 12)
    assert 0.3 <= found["gap"][1] < found["gap"][2] <= 0.5  # paired: books differ, and both sides with them
    assert worth(side((4.0,), (4,)), [])["gap"] is None


def test_a_longer_length_than_the_book_is_the_whole_book():
    rows = [row("a", 10, input_tokens=10), row("a", None, input_tokens=25), row("b", None, input_tokens=8)]
    assert [[one["input_tokens"] for one in rows_at(rows, length)] for length in (10, 20, 30, None)] == [[10, 8], [8], [25, 8], [25, 8]]


def test_tables_name_what_was_left_out_and_pages_escape_everything():
    nasty = "</pre><script>alert(1)</script>&\"'"
    output = {"decoding": "greedy", "seed": None, "text": nasty, "ended": False, "words": 1, "rouge1": 0.1, "rouge2": 0.1, "rougeL": 0.1}
    output |= {"geometric_mean": 0.1, "matched": 0.1, "entity_recall": None, "copy_rate": None}
    more = {"reference": nasty, "nll": 1.0, "nll_wrong": 2.0, "summary_tokens": 3, "state_bytes": 1, "seconds": 1.0, "peak_memory_bytes": 1}
    rows = [{**row(nasty, None, input_tokens=9, **more), "model": nasty, "outputs": [output]}]
    record = {"command": nasty, "started": "", "config": {"lengths": []}, "data": {"m": {"skipped": {"an empty text": 2}}}, "rows": rows}
    page = booksum_page(record)
    assert "script" not in {tag for tag, _ in Tags(page).tags} and page.count("&lt;script&gt;") >= 4
    record |= {"source": {"commit": "c", "dirty": False}, "machine": {"cores": 1, "cpu": "x", "gpus": []}}
    record |= {"seeds": {}, "versions": {}, "seconds": 1.0}
    assert "Pairs left out: 2 with an empty text." in booksum_table(record)


def test_training_begins_with_the_weights_of_another_run(trained, capsys):
    from infini.model import InfiniTransformer
    from infini.report.fingerprint import fingerprint

    longer = ["train", "debug=tiny", *SHAPE, *TASK, *LEAVE, "weights=runs/books/model", "task.segments=12", "output=runs/more"]
    assert main([*longer, "train.learning_rate=1e-30", "train.weight_decay=0"]) == 0
    record = json.loads((trained / "runs/more/record.json").read_text())
    before, after = (InfiniTransformer.from_pretrained(trained / f"runs/{name}/model") for name in ("books", "more"))
    assert fingerprint(before) == fingerprint(after) == record["data"]["origin"]["weights_sha256"]
    assert record["data"]["origin"]["gradient_tokens"] == 8 * 32 and record["metrics"]["gradient_tokens"] == 12 * 32
    shorter = [part.replace("task.segments=12", "task.segments=5").replace("runs/more", "runs/less") for part in longer]
    assert main(shorter) == 0  # how far its weights reached before is not forgotten
    assert json.loads((trained / "runs/less/record.json").read_text())["metrics"]["gradient_tokens"] == 8 * 32
    capsys.readouterr()
    assert main(["train", "debug=tiny", *SHAPE, *TASK, *LEAVE, "output=runs/more"]) == 2
    assert "runs/more holds a run with" in capsys.readouterr().err
    assert main([*longer[:-1], "model.rope_theta=500", "output=runs/other"]) == 2
    assert "model.rope_theta is 500.0, but the weights in runs/books/model are of a model with 10000.0" in capsys.readouterr().err


def test_a_book_that_ends_at_the_length_counts():
    rows = [row("a", None, input_tokens=10), row("b", None, input_tokens=11)]
    assert [one["pair"] for one in rows_at(rows, 10)] == ["a"]


def test_shares_of_questions_are_no_narrower_than_wilsons_either():
    """Two books, each 10 of 20 right: resampled they have no width; Wilson's interval of 20 of 40 by hand."""
    rows = [row(book, None, beyond={"questions": 20, "right": 10.0, "turned": 5.0, "margin": 0.0}) for book in "ab"]
    assert cloze(rows)["accuracy"] == pytest.approx((0.5, 0.35199, 0.64801), abs=1e-4)


def test_a_memory_is_worth_what_it_adds_to_the_same_book():
    ours, theirs = ([row(book, None, nll=nll, nll_wrong=nll + more, summary_tokens=10) for book, nll in order] for order, more in (
        ((("a", 1.0), ("b", 2.0)), 9.0), ((("c", 4.0), ("b", 8.0)), 4.0),
    ))  # fmt: skip
    assert worth(ours, theirs)["gap"] == (0.5, None, None)  # b alone: (9 - 4) / 10


def test_a_sweep_keeps_every_seed_of_a_book_and_the_whole_book_alone():
    def run(seed):
        rows = [row(book, None, input_tokens=9000, nll=1.0, nll_wrong=1.0 + 2 * seed, summary_tokens=2) for book in "ab"]
        rows += [one | {"variant": "memory silenced", "nll_wrong": 0.0} for one in rows]
        rows += [one | {"length": 4, "input_tokens": 4, "nll_wrong": 50.0} for one in rows]
        return Run({"seed": str(seed)}, evaluations={"test": {"kind": "booksum", "rows": rows}})

    cells = books_table(Sweep((), (Setting((), "", (run(0), run(1))),)), "test").splitlines()[2].strip("| ").split(" | ")
    # Gaps of 0 and 2 nats, two tokens each; silenced -1 in both seeds.
    assert cells[:5] == ["2 of 2", "2", "0.5000 [0.5000, 0.5000]", "-0.5000 [-0.5000, -0.5000]", "+1.0000 [+1.0000, +1.0000]"]


def test_by_distance_it_says_how_many_pairs():
    cell = {"from": 512, "questions": 8, "right": 4.0, "turned": 3.0, "margin": 0.0}
    rows = [row("a", None, input_tokens=9, nll=1.0, nll_wrong=2.0, summary_tokens=2, cloze=[cell])]
    assert re.search(r"\| m \| whole model \| 75.0 \[.*\] % of 4 \|", _by_distance({"rows": rows}))
