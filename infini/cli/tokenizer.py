"""`infini tokenizer`: learns a byte-level BPE tokenizer from training texts, and leaves a record of which."""

import hashlib
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from infini.cli.build import fill
from infini.cli.compose import MODULE, compose
from infini.errors import InputError

# A name that says so itself; "latest" and "contest" do not.
_HELD_OUT = re.compile(r"(?<![a-z])(test|valid|validation|val|dev|eval)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Command:
    """The keys of conf/tokenizer.yaml, described there."""

    texts: tuple[str, ...]
    column: str
    vocab_size: int
    output: str


def run(arguments: list[str]) -> None:
    """Learns the tokenizer, prints its table and leaves `tokenizer.json` and a record.

    Raises:
        InputError: an override or texts that cannot be used, held-out files, or an output folder that holds another tokenizer.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: infini tokenizer [KEY=VALUE ...]\n\n" + (files(MODULE) / "tokenizer.yaml").read_text())
        return
    config = compose("tokenizer", arguments)
    command = fill(Command, "", config)
    from infini.data.bpe import BPETokenizer, train_bpe
    from infini.report.record import make_record, write_atomically, write_record
    from infini.report.render import render
    from infini.tokenizer_file import FILE, fingerprint

    started, path = time.time(), Path(command.output) / FILE
    paths = _training_files(command)
    read = _Read(paths, command.column)
    content = train_bpe(read, command.vocab_size)
    if path.exists() and path.read_bytes() != content:
        raise InputError(f"{path} is there already and is another tokenizer: models may need it; choose another output folder")
    write_atomically(path, content)
    tokenizer = BPETokenizer(path)
    tokens = sum(len(tokenizer.encode_bytes(text.encode())) for text in read.first)
    size = sum(len(text.encode()) for text in read.first)
    metrics = {
        "vocab_size": tokenizer.vocab_size,
        "documents": read.documents,
        "bytes": read.bytes,
        "words": read.words,
        "bytes_per_token": size / tokens,
        "tokens_per_word": tokens / sum(len(text.split()) for text in read.first),
        "documents_encoded": len(read.first),
    }
    data = {"texts_sha256": read.digest.hexdigest(), "tokenizer_sha256": fingerprint(path), "files": [Path(name).name for name in paths]}
    if read.skipped:
        data["skipped"] = dict(read.skipped)
    record = Path(command.output) / "record.json"
    write_record(make_record("tokenizer", config=config, data=data, seeds={}, started=started, metrics=metrics), record)
    written = render(record)
    print(written[0].read_text())
    print("\n".join(map(str, [path, record, *written])))


def _training_files(command: Command) -> list[str]:
    from infini.data.documents import find_files

    paths = [path for pattern in command.texts for path in find_files(pattern)]
    if not paths:
        raise InputError("texts is empty; name text, Parquet, JSONL or CSV files, or glob patterns of them")
    for path in paths:
        if _HELD_OUT.search(Path(path).name):
            raise InputError(
                f"{path} calls itself held out: a tokenizer that has seen it spoils what is measured on it; "
                "name the files of the training split (train-*.parquet)"
            )
    return paths


class _Read:
    """The documents, noting on the way what the record is to say of them."""

    def __init__(self, paths: list[str], column: str):
        self.paths, self.column = paths, column
        self.documents = self.bytes = self.words = 0
        self.digest, self.skipped = hashlib.sha256(), Counter()
        self.first: list[str] = []
        """The first documents, 16 MB or a little more: what the rates are measured on."""

    def __iter__(self) -> Iterator[str]:
        from tqdm import tqdm

        from infini.data.documents import read_documents

        with tqdm(unit="B", unit_scale=True, desc="reading", disable=None) as bar:
            for document in read_documents(self.paths, self.column, self.skipped):
                data = document.text.encode()
                if self.bytes < 2**24:
                    self.first.append(document.text)
                self.documents, self.bytes = self.documents + 1, self.bytes + len(data)
                self.words += len(document.text.split())
                self.digest.update(data)
                bar.update(len(data))
                yield document.text
