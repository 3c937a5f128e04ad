import sys

import pytest
import torch
from infini.tasks.passkey.prompt import Haystack
from infini.tasks.text_files import read_texts

from infini.errors import InputError


def parquet(path, columns):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)


def test_a_pattern_reads_all_its_files_in_order_of_name(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"Text {name}: naïve.", encoding="utf-8")
    (tmp_path / "a.md").write_text("no")
    assert read_texts(f"{tmp_path}/*.txt") == "Text a: naïve.\n\nText b: naïve.\n\nText c: naïve."
    assert read_texts(f"{tmp_path}/[ac].txt") == "Text a: naïve.\n\nText c: naïve."


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    (tmp_path / "[a].txt").write_text("Own.")
    (tmp_path / "a.txt").write_text("Other.")
    assert read_texts(f"{tmp_path}/[a].txt") == "Own."


def test_parquet_gives_the_text_column_document_after_document(tmp_path):
    parquet(tmp_path / "x-0.parquet", {"id": [1, 2], "text": ["One “a”.", "Two."]})
    parquet(tmp_path / "x-1.parquet", {"text": ["Three.", None]})
    assert read_texts(f"{tmp_path}/x-*.parquet") == "One “a”.\n\nTwo.\n\nThree."


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe\x00"])
def test_a_file_without_text_is_refused_by_name(tmp_path, content):
    if content is not None:
        (tmp_path / "own.txt").write_bytes(content)
    with pytest.raises(InputError, match="own.txt"):
        read_texts(str(tmp_path / "own.txt"))


def test_parquet_without_text_or_not_parquet_at_all_is_refused(tmp_path):
    parquet(tmp_path / "x.parquet", {"body": ["One."], "id": [1]})
    with pytest.raises(InputError, match="no column 'text'; its columns are body, id"):
        read_texts(str(tmp_path / "x.parquet"))
    (tmp_path / "y.parquet").write_text("not that")
    with pytest.raises(InputError, match="y.parquet is not a Parquet file"):
        read_texts(str(tmp_path / "y.parquet"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="needs pyarrow.*pip install pyarrow"):
        read_texts(str(tmp_path / "x.parquet"))


def test_a_haystack_of_text_is_read_in_a_circle_from_anywhere(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("0123")
    (tmp_path / "b.txt").write_text("4567")
    haystack = Haystack.load(f"text:{tmp_path}/*.txt", tokenizer)
    assert tokenizer.decode(haystack.run(9, 13).tolist()) == "70123\n\n456701"
    assert haystack.run(3, 0).shape == (0,) and haystack.run(3, 5).dtype == torch.int64
