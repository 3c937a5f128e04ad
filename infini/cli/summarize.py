"""`infini summarize`: reads a book of any size, in constant memory, and prints a summary."""

import codecs
import logging
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from infini.cli import generate
from infini.cli.build import fill
from infini.cli.compose import MODULE, compose
from infini.errors import InputError


@dataclass(frozen=True)
class Command:
    """The keys of conf/summarize.yaml, described there.

    Raises:
        InputError: no such book, or a prompt that does not begin on a new line.
    """

    checkpoint: str | None
    input: str
    session: str | None
    temperature: float
    top_p: float | None
    max_new_tokens: int
    seed: int
    prompt: str
    stop: str | None
    piece: int
    decode: Literal["eager", "graph", "auto"]
    device: str
    dtype: Literal["float32", "bfloat16", "float16"] | None

    def __post_init__(self) -> None:
        if not Path(self.input).exists():
            raise InputError(f"input is {self.input!r}; there is no such file")
        if not Path(self.input).is_file():
            raise InputError(f"input is {self.input!r}, which is no regular file; give a text file on a disk")
        if not self.prompt.startswith("\n"):
            raise InputError(f"prompt is {self.prompt!r}; it must begin with a line end, which parts it from the book")


def run(arguments: list[str]) -> None:
    """Reads the book and prints its summary; progress goes to the standard error.

    Raises:
        InputError: an override, a checkpoint or a saved session that cannot be used, a book that is not UTF-8 or shorter than a segment.
        KeyboardInterrupt: after Ctrl-C, when what was read is saved (with `session`).
    """
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: infini summarize [KEY=VALUE ...]\n\n" + (files(MODULE) / "summarize.yaml").read_text())
        return
    command = fill(Command, "", compose("summarize", arguments))
    logging.basicConfig(format="%(message)s")
    logging.getLogger("infini").setLevel(logging.INFO)
    asked = asdict(command)
    book, prompt = asked.pop("input"), asked.pop("prompt")
    # A question stands on a line of its own: the prompt's first line end is the one put before it.
    question = generate.Command(prompt_file=book, questions=(prompt[1:],), top_k=None, **asked)
    _require_text(Path(book))
    session, tokenizer = generate.read(question)
    segment = session.model.config.segment_length
    if session.tokens_seen < segment:
        raise InputError(
            f"{book} has {session.tokens_seen} tokens, less than a segment of this model ({segment}), so its memory is empty; give a longer text"
        )
    generate.answer(question, session, tokenizer, show=False)


def _require_text(path: Path) -> None:
    """Refuse a file that is not UTF-8 before a model reads it as such.

    Raises:
        InputError: it says where.
    """
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as file:
        while part := file.read(2**20):
            try:
                decoder.decode(part)
            except UnicodeDecodeError as error:
                where = f"{error.reason} near byte {done + error.start:,}"
                raise InputError(f"{path} is not UTF-8 text ({where}): convert it, for example with iconv") from None
            done += len(part)
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text (it ends inside a character): convert it, or copy it again") from None
