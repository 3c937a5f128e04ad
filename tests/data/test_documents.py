"""Documents from every kind of file, and what is said of those that cannot be read."""

import csv
import gc
import gzip
import json
import logging
import warnings
from collections import Counter

import pytest

from infini.data import documents
from infini.data.documents import read_documents
from infini.errors import InputError

BOOKS = {"a": "One “whale”.\nA second line, with a comma.\n", "b": "  Two. ", "c": "Three\t“x” \U0001f511"}


def named(*arguments, **keywords):
    return {document.name: document.text for document in read_documents(*arguments, **keywords)}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path):
    """The same three documents in every form."""
    import pyarrow
    import pyarrow.parquet as parquet

    rows = [{"id": name, "body": text, "year": 1851} for name, text in BOOKS.items()]
    (tmp_path / "books.jsonl").write_text(lines(rows))
    with gzip.open(tmp_path / "books.jsonl.gz", "wt") as file:
        file.write(lines(rows))
    with open(tmp_path / "books.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "body", "year"])
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "books.parquet")
    return tmp_path


FORMS = ("books.jsonl", "books.jsonl.gz", "books.csv", "books.parquet")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_documents(folder, form):
    assert named(str(folder / form), "body") == BOOKS
    with pytest.raises(InputError, match=f"{form} has no column 'text'; its columns are id, body, year"):
        named(str(folder / form))


@pytest.mark.parametrize("form", [form for form in FORMS if "csv" not in form])  # a CSV file holds text alone
def test_a_column_of_numbers_is_no_text(folder, form):
    with pytest.raises(InputError, match="column 'year' holds int in row 0, not text"):
        named(str(folder / form), "year")


@pytest.mark.parametrize("form", ("books.jsonl", "books.parquet", "books.csv"))
def test_the_hub_gives_them_too(folder, form, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr(documents, "HUB", str(folder))  # a folder of this machine in place of the hub
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # datasets leaves CSV files open
        assert named(str(folder / form), "body") == BOOKS
        with pytest.raises(InputError, match="has no column 'text'; its columns are id, body, year"):
            named(str(folder / form))
        gc.collect()


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*arguments, **keywords):
        raise ConnectionError("Couldn't reach it\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=r"x.parquet cannot be read from the hub \(Couldn't reach it\): see that"):
        named("hf://datasets/nobody/nothing/x.parquet")


def test_plain_files_have_no_column(folder):
    (folder / "d.txt").write_text("four")
    assert named([str(folder / "books.jsonl"), str(folder / "d.txt")], "body") == BOOKS | {"d.txt": "four"}


@pytest.mark.parametrize("form", ["x.csv", "x.csv.gz"])
def test_a_book_in_one_field_keeps_its_line_ends(tmp_path, form):
    book, limit = "a line\r\n" * 20_000, 131_072  # Python's own
    csv.field_size_limit(limit)
    with (gzip.open if form.endswith("gz") else open)(tmp_path / form, "wt", newline="") as file:
        csv.writer(file).writerows([["text"], [book]])
    assert named(str(tmp_path / form)) == {f"{form}:0": book}
    assert csv.field_size_limit() == limit  # of other readers in this process


def test_an_id_may_be_zero(tmp_path):
    (tmp_path / "x.jsonl").write_text(lines([{"id": 1, "text": "one"}, {"id": 0, "text": "none"}]))
    assert named(str(tmp_path / "x.jsonl")) == {"1": "one", "0": "none"}


def test_a_gzip_file_cut_short_is_refused(folder):
    cut = folder / "cut.jsonl.gz"
    cut.write_bytes((folder / "books.jsonl.gz").read_bytes()[:-9])
    with pytest.raises(InputError, match="cut.jsonl.gz is not a UTF-8 text file: .*end-of-stream"):
        named(str(cut), "body")


def test_patterns_reach_below_and_a_name_may_look_like_one(tmp_path):
    (tmp_path / "below" / "folder.txt").mkdir(parents=True)
    for name in ("a.txt", "below/b.txt", "c[1].txt"):
        (tmp_path / name).write_text(name)
    assert list(named(f"{tmp_path}/**/*.txt")) == ["a.txt", "b.txt", "c[1].txt"]
    assert list(named(f"{tmp_path}/c[1].txt")) == ["c[1].txt"]


def test_rows_without_an_id_are_named_after_file_and_row(tmp_path):
    (tmp_path / "x.jsonl").write_text(lines([{"text": "one"}, {"text": ""}, {"text": "three"}]))
    assert named(str(tmp_path / "x.jsonl")) == {"x.jsonl:0": "one", "x.jsonl:2": "three"}


def test_what_is_left_out_is_counted_and_said(tmp_path, caplog):
    rows = [{"text": text} for text in ("one", "", " \n", None, "a\0b", "six")]
    (tmp_path / "x.jsonl").write_text(lines(rows) + "\n")
    skipped = Counter()
    with caplog.at_level(logging.WARNING):
        assert list(named(str(tmp_path / "x.jsonl"), skipped=skipped).values()) == ["one", "six"]
    assert skipped == {"empty": 4, "binary": 1}
    assert "left out 4 empty and 1 binary documents" in caplog.text


def test_files_come_in_order_of_patterns_and_names(tmp_path):
    for name in ("b.txt", "a.txt", "z.md"):
        (tmp_path / name).write_text(name)
    assert list(named([f"{tmp_path}/*.md", f"{tmp_path}/*.txt"])) == ["z.md", "a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"{}\n", "has no column 'text'; its columns are "),
        ("x.jsonl", b'{"text": "a"}\nnot json\n', "line 2 is not JSON"),
        ("x.jsonl", b"[1]\n", "line 1 is no object"),
        ("x.jsonl", b"\xff\xfe", "is not a UTF-8 text file"),
        ("x.jsonl", b'{"text": " "}\n', "holds no text"),
        ("x.jsonl.gz", b"not gzip", "is not a UTF-8 text file"),
        ("x.jsonl.zst", b"(\xb5/\xfd", "compressed with zstd; unpack it"),
        ("x.csv", b"text\n", "holds no text"),
        ("x.txt", b"a\0b", "holds zero bytes"),
        ("x.txt", b" \n", "holds no text"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}.*{message}"):
        named(str(tmp_path / name))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="nowhere.txt does not exist"):
        named(f"{tmp_path}/nowhere.txt")
