"""Books with their summaries, from every kind of file, and what is wrong with files."""

import csv
import json
import logging

import pytest
from infini.tasks.booksum.pairs import PairFiles, digest, read_pairs

from infini.errors import InputError

FOREIGN = "/export/longsum/booksumm"


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return (str(path),)


def test_tables_joined_by_a_column(library, pair_files):
    texts, summaries = library
    pairs, skipped = read_pairs(PairFiles(**pair_files))
    assert [(pair.name, pair.book, pair.text, pair.summary) for pair in pairs] == [(name, name, texts[name], summaries[name]) for name in texts]
    assert skipped == {} and digest(pairs) != digest(pairs[::-1])


def test_parquet_with_other_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"bid": [7, 8], "body": ["one\r\ntwo", "three"], "other": [0, 0]}), tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"bid": [8, 7, 7], "brief": ["c", "a", "b"]}), tmp_path / "s.parquet")
    files = PairFiles(pairs=(f"{tmp_path}/s.parquet",), books=(f"{tmp_path}/b.parquet",), key="bid", text="body", summary="brief")
    pairs, _ = read_pairs(files)
    assert [(pair.name, pair.book, pair.text, pair.summary) for pair in pairs] == [
        ("8", "8", "three", "c"), ("7", "7", "one\ntwo", "a"), ("7 (2)", "7", "one\ntwo", "b")
    ]  # fmt: skip
    with pytest.raises(InputError, match="no column 'text'; its columns are bid, body, other"):
        read_pairs(PairFiles(pairs=files.pairs, books=files.books, key="bid", summary="brief"))


def test_one_table_with_missing_texts(tmp_path, caplog):
    """The form of BookSum's chapters on the hub: rows lack their text, and a summary may be JSON."""
    rows = [
        {"bid": "1", "chapter": "It rained.", "summary_text": "Rain."},
        {"bid": "2", "chapter": "", "summary_text": "Lost."},
        {"bid": "3", "chapter": "It snowed.", "summary_text": "  "},
        {"bid": "4", "chapter": "It h\0iled.", "summary_text": "Hail."},
        {"bid": "5", "chapter": "It blew.", "summary_text": json.dumps({"summary": ["Wind.", "Storm."], "analysis": ["A symbol."]})},
    ]
    columns = {"key": "bid", "text": "chapter", "summary": "summary_text"}
    with caplog.at_level(logging.WARNING, "infini"):
        pairs, skipped = read_pairs(PairFiles(pairs=write_lines(tmp_path / "a.jsonl", rows), **columns))
    assert [pair.summary for pair in pairs] == ["Rain.", "Wind.\n\nStorm."]
    assert skipped == {"an empty text": 1, "an empty summary": 1, "a zero byte in the text": 1}
    assert "2 pairs of a text and a summary; left out: 1 with a zero byte in the text, 1 with an empty summary" in caplog.text
    with open(tmp_path / "a.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(row for row in rows if "\0" not in row["chapter"])
    assert read_pairs(PairFiles(pairs=(f"{tmp_path}/a.csv",), **columns))[0] == pairs
    missing = write_lines(tmp_path / "b.jsonl", [{"bid": 1, "chapter": None, "summary_text": float("nan")}])
    with pytest.raises(InputError, match="give no pair of a text and a summary .1 with an empty text."):
        read_pairs(PairFiles(pairs=missing, **columns))


def test_rows_of_one_key_may_be_chapters(tmp_path):
    rows = [{"id": "b", "text": text, "summary": summary} for text, summary in (("One.", "1"), ("Two.", "2"), ("One.", "I"), ("Two.", "II"))]
    pairs, _ = read_pairs(PairFiles(pairs=write_lines(tmp_path / "a.jsonl", rows)))
    assert [(pair.name, pair.book, pair.text) for pair in pairs] == [
        ("b", "b", "One."), ("b #2", "b #2", "Two."), ("b (2)", "b", "One."), ("b #2 (2)", "b #2", "Two.")
    ]  # fmt: skip


def test_several_summaries_in_one_row(tmp_path):
    """The form of BookSum's whole books on the hub: a list of objects, each from another site."""
    rows = [
        {"bid": "1", "text": "It rained.", "summary": [{"source": "a", "text": "Rain.", "analysis": "Sad."}, {"source": "b", "text": ""}]},
        {"bid": "2", "text": "It blew.", "summary": ["Wind.", "Storm."]},
        {"bid": "3", "text": "It froze.", "summary": []},
    ]
    files = write_lines(tmp_path / "a.jsonl", rows)
    pairs, skipped = read_pairs(PairFiles(pairs=files, key="bid"))
    assert [(pair.name, pair.summary) for pair in pairs] == [("1", "Rain."), ("2", "Wind."), ("2 (2)", "Storm.")]
    assert skipped == {"an empty summary": 2}
    assert read_pairs(PairFiles(pairs=files, books=files, key="bid")) == (pairs, skipped)
    with pytest.raises(InputError, match="column 'summary' holds int, not text"):
        read_pairs(PairFiles(pairs=write_lines(tmp_path / "b.jsonl", [{"bid": 1, "text": "It rained.", "summary": [3]}]), key="bid"))


def test_files_on_the_hub(monkeypatch):
    """They are opened as files of their kind, not as a data set with a script."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(kind, **options):
        asked.append((kind, options["data_files"], options["streaming"]))
        if "gone" in options["data_files"]:
            raise OSError("no such file\nand more")
        return [{"bid": "1", "chapter": "It rained.", "summary_text": "Rain."}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    columns = {"key": "bid", "text": "chapter", "summary": "summary_text"}
    pairs, _ = read_pairs(PairFiles(pairs=("hf://datasets/kmfoda/booksum/test.csv",), **columns))
    assert pairs[0].summary == "Rain." and asked == [("csv", "hf://datasets/kmfoda/booksum/test.csv", True)]
    with pytest.raises(InputError, match="cannot be read from the hub .no such file."):
        read_pairs(PairFiles(pairs=("hf://datasets/gone/test.csv",), **columns))


@pytest.fixture
def booksum(tmp_path):
    """BookSum's own layout: lists that name files of another machine, some of which nobody has."""
    for path, content in {
        "all_chapterized_books/1-chapters/book_clean.txt": "The whole of it.",
        "all_chapterized_books/1-chapters/01.txt": "A chapter.",
        "all_chapterized_books/1-chapters/02.txt": "Another.",
        "finished_summaries/x/One/overview.json": json.dumps({"name": "Overview", "summary": ["Short.", "Very."], "analysis": ["Deep."]}),
        "finished_summaries/y/One/overview.txt": json.dumps({"summary": "First.<PARAGRAPH>Then.", "analysis": None}),
        "finished_summaries/x/One/section_0.txt": "Plain words.",
        "finished_summaries/x/One/section_1.txt": json.dumps({"summary": []}),
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    return tmp_path


def aligned(kind, path, summary, **more):
    return {"bid": "1", kind: f"{FOREIGN}/all_chapterized_books/{path}", "summary_path": f"{FOREIGN}/finished_summaries/{summary}", **more}


def test_booksum_books(booksum):
    rows = [
        aligned("book_path", "1-chapters/book_clean.txt", "x/One/overview.txt"),  # the file is .json
        aligned("book_path", "1-chapters/book_clean.txt", "y/One/overview.txt"),
        aligned("book_path", "1-chapters/book_clean.txt", "y/One/overview.txt"),
        aligned("book_path", "2-chapters/book_clean.txt", "y/One/overview.txt"),
        aligned("book_path", "1-chapters/book_clean.txt", "z/One/overview.txt"),
    ]
    files = PairFiles(pairs=write_lines(booksum / "books.jsonl", rows), root=str(booksum))
    pairs, skipped = read_pairs(files)
    assert [(pair.name, pair.book, pair.summary) for pair in pairs] == [("1", "1", "Short.\n\nVery."), ("1 (2)", "1", "First.\n\nThen.")]
    assert skipped == {"files named before": 1, "no file of the text": 1, "no file of the summary": 1}
    with pytest.raises(InputError, match="root is None; give root=FOLDER with all_chapterized_books"):
        read_pairs(PairFiles(pairs=files.pairs))


def test_booksum_chapters(booksum):
    rows = [
        aligned("chapter_path", "1-chapters/01.txt", "x/One/section_0.txt", book_id="One.chapter 1"),
        aligned("chapter_path", "1-chapters/02.txt", "x/One/section_1.txt", book_id="One.chapter 2"),
    ]
    pairs, skipped = read_pairs(PairFiles(pairs=write_lines(booksum / "chapters.jsonl", rows), root=str(booksum)))
    assert [(pair.book, pair.text, pair.summary) for pair in pairs] == [("One.chapter 1", "A chapter.", "Plain words.")]
    assert skipped == {"an empty summary": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.jsonl", b'{"id": "lost", "summary": "x"}', "the summary of 'lost' has no book in .*books.jsonl; give the table"),
        ("s.jsonl", b'{"id": "sea", "brief": "x"}', "s.jsonl has no column 'summary'; its columns are id, brief"),
        ("s.jsonl", '{"id": "sea", "summary": "é"}'.encode("latin-1"), "s.jsonl is not a UTF-8 text file .*iconv"),
        ("s.jsonl", b'{"id": "sea", "summary": ', "s.jsonl cannot be read as json"),
        ("s.jsonl", b'{"id": "sea", "summary": 3}', "column 'summary' holds int, not text"),
        ("s.jsonl", b"[3]", "line 1 is no object"),
        ("s.jsonl", b"", "give no pair of a text and a summary .the files have no rows."),
        ("s.txt", b"x", "s.txt is no table of pairs"),
        ("s.parquet", b"x", "s.parquet is not a Parquet file"),
    ],
)
def test_summaries_that_cannot_be_used(pair_files, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_pairs(PairFiles(pairs=(str(tmp_path / name),), books=pair_files["books"]))


def test_books_that_cannot_be_used(pair_files):
    with pytest.raises(InputError, match="the book 'sea' is given twice"):
        read_pairs(PairFiles(pairs=pair_files["pairs"], books=pair_files["books"] * 2))
    with pytest.raises(InputError, match="nowhere.jsonl does not exist"):
        read_pairs(PairFiles(pairs=pair_files["pairs"], books=("nowhere.jsonl",)))
    with pytest.raises(InputError, match="pairs is empty"):
        read_pairs(PairFiles(pairs=()))
