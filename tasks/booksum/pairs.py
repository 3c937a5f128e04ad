"""Books with their summaries: from two tables, from one, or from BookSum's own files."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from infini.tasks.booksum.tables import read_rows, read_text

from infini.data.documents import HUB, find_files
from infini.errors import InputError

PARAGRAPH = "<PARAGRAPH>"  # between the paragraphs of BookSum's raw summaries

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """A text and a summary of it.

    Attributes:
        name: of the pair; that of the book, with a number behind it where the book has several summaries.
        book: of the text: pairs of one text have the same. Where rows of one key have several texts (chapters), these are numbered.
        text, summary: as they are in the files, with ``\\n`` as line ends.
    """

    name: str
    book: str
    text: str
    summary: str


@dataclass(frozen=True, kw_only=True)
class PairFiles:
    """Where pairs come from.

    Attributes:
        pairs: tables of summaries, see :func:`infini.tasks.booksum.tables.read_rows`; or BookSum's alignment files (JSONL with
            ``summary_path``), which name the files of texts and summaries below ``root``.
        books: tables of texts, joined with the summaries by ``key``. None of them: the texts stand beside the summaries.
        key: column that names the book, in both.
        text: column of the text.
        summary: column of the summary, or of a list of them.
        root: folder in which BookSum's ``all_chapterized_books`` and ``finished_summaries`` lie, for alignment files.
    """

    pairs: tuple[str, ...]
    books: tuple[str, ...] = ()
    key: str = "id"
    text: str = "text"
    summary: str = "summary"
    root: str | None = None


def read_pairs(files: PairFiles) -> tuple[list[Pair], dict[str, int]]:
    """All pairs, in the order of the summaries, and how many were left out, by reason.

    Left out, counted and logged: pairs with an empty text or summary, or with a zero byte in one (BookSum's crawled tables have
    some), and, of alignment files, those whose files are missing (texts and summaries must be collected apart from them) and those
    named twice. Of a summary in BookSum's JSON the analysis is left out, which is no summary.

    Raises:
        InputError: a file or column that is missing, text that is not UTF-8, a summary without its book, a book given twice, no pair.
    """
    skipped: Counter = Counter()
    if not files.pairs:
        raise InputError("pairs is empty; give tables of summaries, or BookSum's alignment files")
    found = list(_aligned(files, skipped) if _is_alignment(files) else _joined(files) if files.books else _beside(files))
    kept, per_book, texts = [], Counter(), defaultdict(list)
    for book, text, summary in found:
        text, summary = ((value or "").replace("\r\n", "\n") for value in (text, _plain_summary(summary)))
        reason = _unusable(text, summary)
        if reason:
            skipped[reason] += 1
            continue
        if text not in texts[book]:  # rows of one key may be chapters: texts of their own
            texts[book].append(text)
        if number := texts[book].index(text):
            book = f"{book} #{number + 1}"
        per_book[book] += 1
        name = book if per_book[book] == 1 else f"{book} ({per_book[book]})"
        kept.append(Pair(name, book, text, summary.strip()))
    if skipped:
        reasons = ", ".join(f"{count} with {why}" for why, count in sorted(skipped.items()))
        logger.warning("%d pairs of a text and a summary; left out: %s", len(kept), reasons)
    if not kept:
        reasons = ", ".join(f"{count} with {why}" for why, count in sorted(skipped.items())) or "the files have no rows"
        raise InputError(f"{', '.join(files.pairs)} give no pair of a text and a summary ({reasons}); see that the texts are there")
    return kept, dict(skipped)


def digest(pairs: Sequence[Pair]) -> str:
    """SHA-256 of all texts and summaries, in their order."""
    whole = hashlib.sha256()
    for pair in pairs:
        for part in (pair.book, pair.text, pair.summary):
            whole.update(hashlib.sha256(part.encode()).digest())
    return whole.hexdigest()


def _unusable(text: str, summary: str) -> str | None:
    for what, value in (("text", text), ("summary", summary)):
        if not value.strip():
            return f"an empty {what}"
        if "\0" in value:
            return f"a zero byte in the {what}"
    return None


def _joined(files: PairFiles) -> Iterator[tuple[str, str, str]]:
    texts: dict[str, str] = {}
    for row in read_rows(files.books, (files.key, files.text)):
        book = str(row[files.key])
        if book in texts:
            raise InputError(f"the book {book!r} is given twice in {', '.join(files.books)}; name each file once")
        texts[book] = _text_of(row, files.text)
    for row in read_rows(files.pairs, (files.key, files.summary)):
        book = str(row[files.key])
        if book not in texts:
            raise InputError(f"the summary of {book!r} has no book in {', '.join(files.books)}; give the table with its text too")
        yield from ((book, texts[book], summary) for summary in _summaries_of(row, files.summary))


def _beside(files: PairFiles) -> Iterator[tuple[str, str, str]]:
    for row in read_rows(files.pairs, (files.key, files.text, files.summary)):
        yield from ((str(row[files.key]), _text_of(row, files.text), summary) for summary in _summaries_of(row, files.summary))


def _summaries_of(row: dict, column: str) -> list[str]:
    """A summary, or several: a list of texts, or of objects with a ``text``."""
    value = row[column]
    if not isinstance(value, list):
        return [_text_of(row, column)]
    return [_text_of(one, "text") if isinstance(one, dict) and "text" in one else _text_of({column: one}, column) for one in value] or [""]


def _text_of(row: dict, column: str) -> str:
    value = row[column]
    if value is None or value != value:  # a missing one is NaN in tables made with pandas
        return ""
    if not isinstance(value, str):
        raise InputError(f"column {column!r} holds {type(value).__name__}, not text; name another column")
    return value


def _is_alignment(files: PairFiles) -> bool:
    first = files.pairs[0]
    if first.startswith(HUB) or not find_files(first)[0].endswith(".jsonl"):
        return False
    row = next(read_rows([first], ()), {})
    return "summary_path" in row and files.summary not in row


def _aligned(files: PairFiles, skipped: Counter) -> Iterator[tuple[str, str, str]]:
    if files.root is None or not Path(files.root).is_dir():
        raise InputError(
            f"{files.pairs[0]} names files of BookSum and root is {files.root!r}; give root=FOLDER with all_chapterized_books and "
            "finished_summaries in it"
        )
    seen, texts = set(), {}
    for row in read_rows(files.pairs, ("bid", "summary_path")):
        named = row.get("book_path") or row.get("chapter_path")
        if not named:
            raise InputError(f"{files.pairs[0]} has neither book_path nor chapter_path; give BookSum's book or chapter alignments")
        if (named, row["summary_path"]) in seen:
            skipped["files named before"] += 1
            continue
        seen.add((named, row["summary_path"]))
        paths = [_below(Path(files.root), path) for path in (named, row["summary_path"])]
        if None in paths:
            skipped["no file of the text" if paths[0] is None else "no file of the summary"] += 1
            continue
        if named not in texts:
            texts = {named: read_text(paths[0])}  # rows of one text stand together: no need to hold them all
        # Chapters of one book are texts of their own.
        book = str(row["bid"]) if row.get("book_path") else str(row.get("book_id") or f"{row['bid']}/{Path(named).stem}")
        yield book, texts[named], read_text(paths[1])


def _below(root: Path, named: str) -> Path | None:
    """The file that a path of another machine names: its last parts, as many as lead somewhere below the root."""
    parts = Path(named).parts
    for start in range(len(parts) - 1):
        path = root.joinpath(*parts[start:]) if not Path(parts[start]).is_absolute() else Path(named)
        # The same summary is .txt in one list and .json in another.
        for candidate in (path, path.with_suffix(".json"), path.with_suffix(".txt")):
            if candidate.is_file():
                return candidate
    return None


def _plain_summary(summary: str) -> str:
    """A summary without the JSON that BookSum wraps it in."""
    if summary.lstrip().startswith("{"):
        try:
            content = json.loads(summary)
        except ValueError:
            return summary
        if isinstance(content, dict) and "summary" in content:
            summary = content["summary"] or ""
            if isinstance(summary, list):
                return "\n\n".join(map(str, summary))
    return summary.replace(PARAGRAPH, "\n\n")
