"""Byte-level BPE: every text comes back, however it arrives; files are safe to load."""

import json
import multiprocessing
import random
import sys

import numpy as np
import pytest

from infini.data.bpe import BPETokenizer, train_bpe
from infini.errors import InputError

WORDS = "the of and to in a is that whale ship sea captain white old man said went 1851 12 naïve “quoted” don't it's – 鍵 \U0001f511".split()
BLANKS = [" ", " ", " ", " ", "\n", "\n\n", "  ", "\t", ", ", ". ", "\u2003", "\u00a0 ", "—", "   \n"]


def write(seed, count):
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice(BLANKS) for _ in range(count))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_bytes(train_bpe((write(seed, 400) for seed in range(20)), 330))
    return path


@pytest.fixture(scope="module")
def tokenizer(path):
    return BPETokenizer(path)


STRANGE = ["", " ", "\0\0a\0", " lead", "trail \n ", "Ā\x00", "".join(map(chr, range(1, 700))), "\U0001f511" * 50, "\u2028x\x85\x1c y"]


@pytest.mark.parametrize("text", [*STRANGE, write(99, 3000)], ids=range(len(STRANGE) + 1))
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_it_compresses_and_gives_each_digit_a_token(tokenizer):
    text = write(99, 3000)
    assert len(tokenizer.encode(text)) < 0.5 * len(text.encode())
    assert [tokenizer.decode([i]) for i in tokenizer.encode("48213")] == list("48213")
    assert len(tokenizer.encode(" 1851")) == 5


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_a_text_that_arrives_in_pieces_gets_the_same_ids(tokenizer, piece):
    data = write(7, 1500).encode()
    whole, waiting, found = tokenizer.encode_bytes(data), b"", []
    for start in range(0, len(data), piece):
        waiting += data[start : start + piece]
        cut = tokenizer.cut(waiting)
        found.append(tokenizer.encode_bytes(waiting[:cut]))
        waiting = waiting[cut:]
    assert len(waiting) < 400  # what waits for its next border does not grow
    assert np.array_equal(np.concatenate([*found, tokenizer.encode_bytes(waiting)]), whole)


def test_a_long_text_is_what_the_library_makes_of_it_in_one(tokenizer, monkeypatch):
    text = write(3, 4000) + "x" * 500 + "鍵" * 300 + write(4, 200)
    monkeypatch.setattr("infini.data.bpe._PIECE", 64)
    ids = tokenizer.encode_bytes(text.encode())
    assert ids.dtype == np.int16
    assert ids.tolist() == tokenizer._tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_encodes_long_texts_too(tokenizer):
    # Workers that make batches are forked, when the library has already made threads here.
    fork, text = multiprocessing.get_context("fork"), write(5, 40000)
    expected, found = tokenizer.encode(text), fork.Queue()
    worker = fork.Process(target=lambda: found.put(tokenizer.encode(text)), daemon=True)
    worker.start()
    try:
        assert found.get(timeout=20) == expected
    finally:
        worker.kill()


def test_the_same_texts_give_the_same_file(path):
    assert train_bpe((write(seed, 400) for seed in range(20)), 330) == path.read_bytes()


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (["some text"], 256, "vocab_size is 256; it must be at least 257"),
        (["some text"], 4000, "vocab_size is 4000, but the texts give 257 entries"),
    ],
)
def test_sizes_that_cannot_be_are_refused(texts, size, message):
    with pytest.raises(InputError, match=message):
        train_bpe(texts, size)


def test_bytes_that_are_no_text_are_refused(tokenizer):
    with pytest.raises(InputError, match="not UTF-8"):
        tokenizer.encode_bytes(b"\xff\xfe")


@pytest.mark.parametrize("content", ["not json", "{}", '{"model": 3}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="tokenizer.json is no BPE tokenizer"):
        BPETokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_that_loses_something_is_refused(path, tmp_path):
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Lowercase"} | {"type": "NFKC"}
    content["model"]["vocab"].pop("Ģ", None)
    del content["pre_tokenizer"]["pretokenizers"][1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="is not a byte-level tokenizer|cannot be read"):
        BPETokenizer(tmp_path / "tokenizer.json")


def test_without_the_library_it_says_what_to_install(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"pip install 'infini-attention\[data\]'"):
        BPETokenizer(path)


def changed(path, folder, **parts):
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(path.read_text()) | parts))
    return BPETokenizer(folder / "tokenizer.json")


def test_ids_of_large_vocabularies_do_not_overflow(path, tmp_path):
    model = json.loads(path.read_text())["model"]
    known = len(model["vocab"])
    model["vocab"] |= {f"no {i}": i for i in range(known, 40_000)} | {"QQ": 40_000}
    model["merges"] = [["Q", "Q"], *model["merges"]]
    large = changed(path, tmp_path, model=model)
    assert large.vocab_size == 40_001 and large.encode("QQ") == [40_000] and large.decode([40_000]) == "QQ"


def test_a_file_that_cuts_texts_cuts_none_here(path, tokenizer, tmp_path):
    cut = {"max_length": 64, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    text = write(11, 200)
    assert changed(path, tmp_path, truncation=cut).encode(text) == tokenizer.encode(text)


def test_an_id_beyond_the_vocabulary_is_refused(path, tmp_path):
    model = json.loads(path.read_text())["model"]
    model["vocab"] |= {"no": 5000}
    with pytest.raises(InputError, match="is not a byte-level tokenizer"):
        changed(path, tmp_path, model=model)
