"""Byte-level BPE: the one door to the library `tokenizers`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

from infini.errors import InputError
from infini.tokenizer_file import fingerprint

PAD = "\0"  # id 0, as with bytes: padding, and the end of a text for tools that want one
SMALLEST = 257  # that and all bytes
# Between a printable ASCII character and a blank no token can lie: the rule that cuts a text into words never joins the two.
_BORDER = re.compile(rb"[!-~](?=[ \n\r\t])")
_PIECE = 2**16  # bytes that are encoded as one text; longer ones only where there is no border


class BPETokenizer:
    """A byte-level BPE tokenizer (arXiv 1508.07909, on bytes as in GPT-2) from a `tokenizer.json`; every text comes back as it was.

    Each digit is a token of its own, so that numbers are equally hard in texts of any vocabulary.

    Args:
        path: the file.

    Raises:
        InputError: `tokenizers` is not installed, or the file is no byte-level BPE tokenizer of this kind.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "tokenizer.json"
        >>> _ = path.write_bytes(train_bpe(["the cat and the hat and the bat"] * 9, vocab_size=264))
        >>> tokenizer = BPETokenizer(path)
        >>> len(tokenizer.encode("the hat and 17")) < 14, tokenizer.decode(tokenizer.encode("naïve\\0 17  "))
        (True, 'naïve\\x00 17  ')
    """

    def __init__(self, path: Path):
        library, self.fingerprint = _library(), fingerprint(path)
        try:
            self._tokenizer = library.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise InputError(f"{path} cannot be read ({error}): copy it again, or make one with infini tokenizer") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._process = os.getpid()
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.dtype = np.int16 if self.vocab_size <= 2**15 else np.int32
        probe = "\0naïve  17\n\u2028鍵 \U0001f511' "
        if self.decode(self.encode(probe)) != probe or sorted(self._tokenizer.get_vocab().values()) != list(range(self.vocab_size)):
            raise InputError(f"{path} is not a byte-level tokenizer that gives every text back: make one with infini tokenizer")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        return self.encode_bytes(text.encode("utf-8")).tolist()

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; what is not valid UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Token ids of a UTF-8 text of any length, `dtype` `[tokens]`.

        Raises:
            InputError: it is not UTF-8.
        """
        try:
            texts = [piece.decode("utf-8") for piece in _pieces(data)]
        except UnicodeDecodeError as error:
            raise InputError(f"the text is not UTF-8 ({error}); this tokenizer reads text alone") from None
        return np.concatenate([np.zeros(0, self.dtype), *(np.array(one.ids, self.dtype) for one in self._encoded(texts))])

    def _encoded(self, texts: list[str]) -> Iterator:
        if len(texts) == 1 or os.getpid() != self._process:
            # A forked process, such as a worker that makes batches, has none of the library's threads and would wait for them for ever.
            for text in texts:
                yield self._tokenizer.encode(text, add_special_tokens=False)
            return
        for start in range(0, len(texts), 64):  # bounds what the library holds of each token
            yield from self._tokenizer.encode_batch_fast(texts[start : start + 64], add_special_tokens=False)

    def cut(self, data: bytes) -> int:
        """How many bytes of `data` have ids that no byte after `data` can change; 0 where that cannot be told.

        So a text can be encoded while it arrives: what stands before the cut, then the rest with what follows.
        """
        return _last_border(data, 0, len(data))


def train_bpe(texts: Iterable[str], vocab_size: int) -> bytes:
    """Learn merges from texts; the same texts give the same file.

    Args:
        texts: documents; read once.
        vocab_size: entries, at least 257: 256 bytes and the padding.

    Returns:
        The content of `tokenizer.json`.

    Raises:
        InputError: `tokenizers` is not installed, the size is too small, or the texts do not have so many pairs that occur twice.
    """
    if vocab_size < SMALLEST:
        raise InputError(f"vocab_size is {vocab_size}; it must be at least {SMALLEST}: every byte, and the padding")
    library = _library()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(
        [library.pre_tokenizers.Digits(individual_digits=True), library.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = library.decoders.ByteLevel()
    settings = {"special_tokens": [PAD], "initial_alphabet": alphabet, "min_frequency": 2, "show_progress": False}
    tokenizer.train_from_iterator(texts, library.trainers.BpeTrainer(vocab_size=vocab_size, **settings))
    if tokenizer.get_vocab_size() != vocab_size:
        raise InputError(
            f"vocab_size is {vocab_size}, but the texts give {tokenizer.get_vocab_size()} entries: lower it or give more text"
        )
    return tokenizer.to_str(pretty=True).encode()


def _library() -> ModuleType:
    # Without a word the library complains on the standard error of every run whose data workers are forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        import tokenizers
    except ImportError:
        raise InputError(
            "a trained tokenizer needs the package tokenizers, which is not installed: pip install 'infini-attention[data]'"
        ) from None
    return tokenizers


def _pieces(data: bytes) -> Iterable[bytes]:
    """A text cut where no token can lie across."""
    start = 0
    while start < len(data):
        stop = len(data) if len(data) - start <= _PIECE else _last_border(data, start, start + _PIECE)
        if stop == start:  # no border near: on to the next one
            border = _BORDER.search(data, start + _PIECE - 1)
            stop = border.end() if border else len(data)
        yield data[start:stop]
        start = stop


def _last_border(data: bytes, start: int, stop: int) -> int:
    """The last border in data[start:stop], or start."""
    # A border needs the byte behind it. Most texts have one within a few hundred bytes.
    for reach in (512, stop - start):
        last = start
        for found in _BORDER.finditer(data, max(start, stop - reach), stop):
            last = found.end()
        if last > start:
            return last
    return start
