"""`infini generate`: reads a file without end into a fixed state, then answers questions about it."""

import hashlib
import logging
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from infini.cli.build import fill, model_class
from infini.cli.compose import MODULE, compose
from infini.errors import InputError

LONGEST_WORD = 2**20  # bytes without a place where a text may be cut, after which it is cut anyway

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """The keys of conf/generate.yaml, described there.

    Raises:
        InputError: a value out of its range.
    """

    checkpoint: str | None
    prompt_file: str
    questions: tuple[str, ...]
    session: str | None
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    stop: str | None
    seed: int
    piece: int
    decode: Literal["eager", "graph", "auto"]
    device: str
    dtype: Literal["float32", "bfloat16", "float16"] | None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "piece"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.stop == "":
            raise InputError("stop is empty; give the text that ends an answer, or null")
        path = Path(self.prompt_file)
        if path.exists() and not path.is_file():
            raise InputError(f"prompt_file is {self.prompt_file!r}, which is no regular file; give a text file on a disk")
        if not path.is_file():
            raise InputError(f"prompt_file is {self.prompt_file!r}; there is no such file")
        if path.stat().st_size == 0:
            raise InputError(f"prompt_file {self.prompt_file!r} is empty; give a file with some text")


def run(arguments: list[str]) -> None:
    """Reads the file and prints the answers; progress goes to the standard error.

    Raises:
        InputError: an override, a file, a checkpoint or a saved session that cannot be used.
        KeyboardInterrupt: after Ctrl-C, when what was read is saved (with `session`).
    """
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: infini generate [KEY=VALUE ...]\n\n" + (files(MODULE) / "generate.yaml").read_text())
        return
    command = fill(Command, "", compose("generate", arguments))
    logging.basicConfig(format="%(message)s")
    logging.getLogger("infini").setLevel(logging.INFO)
    session, tokenizer = read(command)
    answer(command, session, tokenizer)


def read(command: Command):
    """A session of the command's model that has read its file, and the model's tokenizer."""
    import torch

    from infini import checkpoint
    from infini.cli.device import choose_device
    from infini.data.tokenizer import load_tokenizer
    from infini.token_step import wants_capture

    folder, device = checkpoint.resolve(command.checkpoint), choose_device(command.device)
    dtype = getattr(torch, command.dtype) if command.dtype else None
    model = model_class(str(checkpoint.model_type(folder))).from_pretrained(folder, device, dtype)
    tokenizer = load_tokenizer(model.config)
    wants_capture(command.decode, model)  # what cannot be had is said before a book is read
    return _read_file(command, model, tokenizer), tokenizer


def answer(command: Command, session, tokenizer, show: bool = True) -> None:
    """Prints the answer to each question, with the question before it unless `show` is False."""
    text = session.state
    for question in command.questions or (None,):
        if question is not None:
            # The state is a value: every question goes on from the same one.
            session.restart(text)
            session.feed(tokenizer.encode("\n" + question))
            print(question if show else "", end="", flush=True)
        for part in _answer(command, session, tokenizer):
            print(part, end="", flush=True)
        print()


def _read_file(command: Command, model, tokenizer):
    """A session that has read the whole file; it may begin with a saved one."""
    import torch
    from tqdm import tqdm

    from infini.data.text_note import pass_over, write_note
    from infini.report.fingerprint import fingerprint
    from infini.session import StreamingSession
    from infini.train.interrupt import StopRequest

    path, size = Path(command.prompt_file), Path(command.prompt_file).stat().st_size
    session, digest, done = StreamingSession(model, piece=command.piece), hashlib.sha256(), 0
    weights = fingerprint(model) if command.session else None
    with open(path, "rb", buffering=0) as file, StopRequest() as interrupt:
        if command.session and Path(command.session).is_file():
            session = StreamingSession.restore(command.session, model, command.piece)
            done = pass_over(command.session, file, digest, session.tokens_seen, weights)
        if command.session and done < size:
            _require_place(Path(command.session), session.state_bytes + 4 * model.config.vocab_size)
        started, begun, before, waiting = time.perf_counter(), done, session.tokens_seen, b""
        with tqdm(total=size, initial=done, unit="B", unit_scale=True, desc=f"reading {path.name}", disable=None) as bar:
            while part := file.read(command.piece):
                text, waiting = _cut(tokenizer, waiting + part)
                if text:
                    session.feed(torch.tensor(tokenizer.encode_bytes(text)))
                digest.update(text)
                done += len(text)
                bar.set_postfix_str(f"memory {_memory(model) / 2**20:,.0f} MiB", refresh=False)
                bar.update(len(text))
                if interrupt.requested:
                    break
    # What waits may be read otherwise when the file has grown, so it is no part of what is kept.
    if command.session and done > begun:
        session.save(command.session)
        write_note(command.session, done, session.tokens_seen, digest, weights)
    if interrupt.requested:
        kept = f"{session.tokens_seen:,} tokens are kept in {command.session}, the same command goes on from there"
        raise KeyboardInterrupt(kept if command.session else "nothing is kept; with session=FILE what was read would be")
    if waiting:
        session.feed(torch.tensor(tokenizer.encode_bytes(waiting)))
    read, seconds = session.tokens_seen - before, time.perf_counter() - started
    rate = f"{read / seconds:,.0f} tokens/s" if done > begun else "at once, from the saved session"
    print(
        f"{session.tokens_seen:,} tokens read, {rate}; state {session.state_bytes:,} bytes, peak memory {_memory(model) / 2**20:,.0f} MiB",
        file=sys.stderr,
    )
    return session


def _cut(tokenizer, text: bytes) -> tuple[bytes, bytes]:
    """What can be encoded now, and what must wait for the bytes that follow."""
    whole = tokenizer.cut(text)
    if not whole and len(text) > LONGEST_WORD:
        log.warning("%s bytes without a place between two words: the text is cut, and a token there may be another", f"{len(text):,}")
        whole = next(i for i in range(len(text) - 1, 0, -1) if text[i] & 0xC0 != 0x80)  # not inside a character
    return text[:whole], text[whole:]


def _require_place(session: Path, numbers: int) -> None:
    """Refuse, before a text is read for hours, a file in which the session could not be kept afterwards."""
    folder, needed = session.absolute().parent, numbers + 2**16  # and what files say about themselves
    if session.is_dir():
        raise InputError(f"session is {str(session)!r}, which is a folder; name a file in it")
    if not folder.is_dir():
        raise InputError(f"session is {str(session)!r}, but there is no folder {str(folder)!r}; make it, or name a file elsewhere")
    if (free := shutil.disk_usage(folder).free) < needed:
        raise InputError(
            f"session is {str(session)!r}, but only {free:,} bytes are free there and it needs {needed:,}: name a file on another disk"
        )


def _answer(command: Command, session, tokenizer) -> Iterator[str]:
    """The answer, as far as it is certain, while it is generated."""
    import torch

    generator = torch.Generator(next(session.model.parameters()).device).manual_seed(command.seed)
    choice = (command.max_new_tokens, command.temperature, command.top_k, command.top_p)
    steps = session.generate(*choice, generator=generator, decode=command.decode)
    ids, shown = [], 0
    for token in steps:
        ids.append(int(token))
        text = tokenizer.decode(ids)
        if command.stop and command.stop in text:
            yield text[shown : text.index(command.stop)]
            return
        # The last letters may still change: a character that is not whole, or the beginning of `stop`.
        certain = len(text.rstrip("\N{REPLACEMENT CHARACTER}")) - len(command.stop or "")
        if certain > shown:
            yield text[shown:certain]
            shown = certain
    yield tokenizer.decode(ids)[shown:]


def _memory(model) -> int:
    """Bytes at the peak so far: of the GPU's allocator, or of this process."""
    import torch

    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
