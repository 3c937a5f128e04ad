"""Read a book once, keep what was read, load it tomorrow and ask ten questions, each from a copy: `python -m infini.tasks.examples.read_once BOOK`.

The first run reads the book and writes two files of a few megabytes, and a note on what was read. Every later run, on this machine or
another, begins with them, after a look whether book and weights are the same. Prints seconds and bytes. What is answered depends on
the model: the one inside the library knows one question, the pass key's.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import infini
from infini.data.text_note import pass_over, write_note
from infini.data.tokenizer import load_tokenizer
from infini.report.fingerprint import fingerprint

QUESTIONS = (
    "What is the pass key? The pass key is",
    "Who tells the story? It is told by",
    "Where does it begin? It begins in",
    "Who is the hero? The hero is",
    "What does the hero want? The hero wants",
    "Who stands in the way? In the way stands",
    "What is found? It is",
    "Who dies? The one who dies is",
    "How does it end? In the end",
    "What is the last word? The last word is",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads or restores, then answers; 0, or 2 after input that cannot be used."""
    parser = argparse.ArgumentParser(prog="read_once", description=__doc__.partition(":")[0])
    parser.add_argument("book", type=Path, help="a text file of any length")
    parser.add_argument("--session", type=Path, help="where to keep what was read; BOOK.session")
    parser.add_argument("--checkpoint", help="folder of a model; the one inside the library")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--question", action="append", dest="questions", help="may be given several times; ten of its own")
    parser.add_argument("--tokens", type=int, default=12, help="of each answer")
    asked = parser.parse_args(arguments)
    try:
        answer(asked.book, asked.session or asked.book.with_name(asked.book.name + ".session"), asked)
    except (infini.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def answer(book: Path, kept: Path, asked: argparse.Namespace) -> None:
    """The three acts: read and keep, or load; then ask."""
    model = infini.load(asked.checkpoint, asked.device)
    tokenizer = load_tokenizer(model.config)
    weights, digest, started = fingerprint(model), hashlib.sha256(), time.perf_counter()
    with open(book, "rb") as file:
        if kept.exists():
            session = infini.StreamingSession.restore(kept, model)
            pass_over(kept, file, digest, session.tokens_seen, weights)
            if file.read(1):
                raise infini.InputError(f"{book} goes on where {kept} has stopped reading; name another session file")
            print(f"loaded {kept.name}: {kept.stat().st_size:,} bytes, {session.tokens_seen:,} tokens read, {_since(started)}")
        else:
            session = infini.StreamingSession(model)
            for ids in _pieces(file, tokenizer, digest):
                session.feed(ids)
            print(f"read {book.name}: {file.tell():,} bytes, {session.tokens_seen:,} tokens, {_since(started)}")
            started = time.perf_counter()
            session.save(kept)
            write_note(kept, file.tell(), session.tokens_seen, digest, weights)
            print(f"saved {kept.name}: {kept.stat().st_size:,} bytes, {_since(started)}")
    read = session.state  # a value: whoever goes on from it leaves it as it is
    for question in asked.questions or QUESTIONS:
        started = time.perf_counter()
        session.restart(read)
        session.feed(tokenizer.encode("\n" + question))
        written = [int(token) for token in session.generate(asked.tokens)]
        print(f"{question} -> {tokenizer.decode(written)!r}, {_since(started)}, from a copy of {read.nbytes:,} bytes")


def _pieces(file: BinaryIO, tokenizer, digest, size: int = 2**16):
    """The ids of a file, a piece at a time, cut where no token lies across; `digest` gets its bytes."""
    waiting = b""
    while part := file.read(size):
        digest.update(part)
        text = waiting + part
        whole = tokenizer.cut(text)
        waiting = text[whole:]
        if whole:
            yield tokenizer.encode_bytes(text[:whole]).tolist()
    if waiting:
        yield tokenizer.encode_bytes(waiting).tolist()


def _since(started: float) -> str:
    return f"{time.perf_counter() - started:.2f} s"


if __name__ == "__main__":
    sys.exit(main())
