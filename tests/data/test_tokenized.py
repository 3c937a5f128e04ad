"""Token ids on disk: once made, opened again; never mistaken for others."""

import multiprocessing
import pickle
import time

import numpy as np
import pytest

from infini.data import tokenized
from infini.data.bpe import BPETokenizer, train_bpe
from infini.data.documents import Document
from infini.data.tokenized import tokenize, tokenize_documents
from infini.data.tokenizer import ByteTokenizer
from infini.errors import InputError

TEXTS = ("the white whale and the sea", "an old man,\nan old ship " * 30, "naïve")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INFINI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def texts(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    return [f"{tmp_path}/*.txt"]


def bpe(folder, text="the white whale and the sea and an old man, an old ship " * 9, size=270):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes(train_bpe([text], size))
    return BPETokenizer(folder / "tokenizer.json")


@pytest.fixture
def tokenizer(tmp_path):
    return bpe(tmp_path / "tokenizer")


def test_documents_are_theirs_to_the_last_token(texts, tokenizer):
    found = tokenize(texts, tokenizer)
    assert [tokenizer.decode(found[i].tolist()) for i in range(len(found))] == list(TEXTS)
    assert found.names == ("0.txt", "1.txt", "2.txt") and found.words == tuple(len(text.split()) for text in TEXTS)
    assert found.bytes == tuple(len(text.encode()) for text in TEXTS) and found.tokens.dtype == np.int16
    plain = tokenize(texts, ByteTokenizer())
    assert [plain[i].tobytes().decode() for i in range(3)] == list(TEXTS) and plain.folder is None


def test_the_second_time_nothing_is_encoded(texts, tokenizer, cache, monkeypatch):
    first = tokenize(texts, tokenizer)
    monkeypatch.setattr(type(tokenizer), "encode_bytes", None)
    second = tokenize(texts, tokenizer)
    assert isinstance(second.tokens, np.memmap) and second.digest() == first.digest()
    assert (second.names, second.words, second.bytes, second.skipped) == (first.names, first.words, first.bytes, first.skipped)
    assert len(list((cache / "tokens").iterdir())) == 1  # nothing half made is left


def test_other_texts_or_another_tokenizer_are_encoded_anew(texts, tokenizer, tmp_path):
    before = tokenize(texts, tokenizer)
    other = tokenize(texts, bpe(tmp_path / "other", "quite another text, another text " * 9, 270))
    assert other.digest() != before.digest() and other.folder != before.folder
    (tmp_path / "0.txt").write_text(TEXTS[0][::-1])  # of the same size
    assert tokenize(texts, tokenizer).digest() != before.digest()


def test_columns_of_one_file_are_not_taken_for_each_other(tokenizer, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": "the sea", "b": "a whale"}')
    for column, text in (("a", "the sea"), ("b", "a whale")):
        assert tokenizer.decode(tokenize([f"{tmp_path}/x.jsonl"], tokenizer, column)[0].tolist()) == text


def test_texts_that_moved_are_the_same_and_renamed_ones_are_called_anew(texts, tokenizer, tmp_path):
    first, there = tokenize(texts, tokenizer), tmp_path / "there"
    there.mkdir()
    for path in tmp_path.glob("*.txt"):
        path.rename(there / path.name)
    assert tokenize([f"{there}/*.txt"], tokenizer).folder == first.folder
    (there / "2.txt").rename(there / "9.txt")
    assert tokenize([f"{there}/*.txt"], tokenizer).names == ("0.txt", "1.txt", "9.txt")


def test_a_digest_is_that_of_the_documents_that_count(texts, tokenizer, tmp_path):
    found = tokenize(texts, tokenizer)
    (tmp_path / "1.txt").unlink()
    assert tokenize(texts, tokenizer).digest() == found.digest([0, 2]) != found.digest()
    assert found.digest([2, 0]) != found.digest([0, 2])


def test_a_worker_opens_the_file_again(texts, tokenizer):
    found = tokenize(texts, tokenizer)
    sent = pickle.dumps(found)
    assert len(sent) < 1000 < found.tokens.nbytes * 10
    assert np.array_equal(pickle.loads(sent).tokens, found.tokens)
    plain = tokenize(texts, ByteTokenizer())
    assert np.array_equal(pickle.loads(pickle.dumps(plain)).tokens, plain.tokens)


def test_a_process_that_dies_leaves_nothing_that_counts(texts, tokenizer, cache, monkeypatch):
    read = tokenized.read_documents

    def dying(*arguments):
        yield next(iter(read(*arguments)))
        raise MemoryError

    monkeypatch.setattr(tokenized, "read_documents", dying)
    with pytest.raises(MemoryError):
        tokenize(texts, tokenizer)
    assert not list((cache / "tokens").iterdir())


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded, use of fork:DeprecationWarning")
def test_of_processes_that_ask_at_once_one_encodes(texts, tokenizer, cache, monkeypatch):
    encoded, encode = multiprocessing.get_context("fork").Value("i", 0), type(tokenizer).encode_bytes

    def slowly(self, data):
        with encoded:
            encoded.value += 1
        time.sleep(0.2)
        return encode(self, data)

    monkeypatch.setattr(type(tokenizer), "encode_bytes", slowly)
    jobs = [multiprocessing.get_context("fork").Process(target=tokenize, args=(texts, tokenizer)) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(30)
    assert [job.exitcode for job in jobs] == [0, 0, 0] and encoded.value == len(TEXTS)
    assert tokenize(texts, tokenizer).bytes == tuple(len(text.encode()) for text in TEXTS) and encoded.value == len(TEXTS)


def test_documents_at_hand_are_kept_too(tokenizer, cache, monkeypatch):
    documents = [Document(str(i), text) for i, text in enumerate(TEXTS)]
    first = tokenize_documents(documents, tokenizer)
    assert [tokenizer.decode(first[i].tolist()) for i in range(3)] == list(TEXTS) and first.names == ("0", "1", "2")
    monkeypatch.setattr(type(tokenizer), "encode_bytes", None)
    assert tokenize_documents(documents, tokenizer).digest() == first.digest()
    with pytest.raises(TypeError):  # another text is encoded anew
        tokenize_documents([documents[0], Document("1", "an old man"), documents[2]], tokenizer)


def test_documents_that_only_look_alike_are_encoded_anew(tokenizer, tmp_path):
    """Cut elsewhere, called otherwise, or read by another tokenizer."""
    one = tokenize_documents([Document("x", "the sea"), Document("y", "a whale")], tokenizer)
    cut = tokenize_documents([Document("x", "the sea"), Document("ya", " whale")], tokenizer)
    assert tokenizer.decode(cut[1].tolist()) == " whale" and cut.names == ("x", "ya")
    assert tokenize_documents([Document("z", "the sea"), Document("y", "a whale")], tokenizer).names == ("z", "y")
    other = bpe(tmp_path / "other", "quite another text, another text " * 9, 270)
    found = tokenize_documents([Document("x", "the sea"), Document("y", "a whale")], other)
    assert other.decode(found[1].tolist()) == "a whale" and found.folder != one.folder


def test_tokens_that_are_not_those_of_the_index_are_refused(texts, tokenizer):
    found = tokenize(texts, tokenizer)
    fewer = np.array(found.tokens[:-1])
    np.save(found.folder / "tokens.npy", fewer)
    with pytest.raises(InputError, match=f"is damaged .{len(fewer)} tokens, not {len(fewer) + 1}"):
        tokenize(texts, tokenizer)


def test_a_damaged_file_is_said(texts, tokenizer):
    folder = tokenize(texts, tokenizer).folder
    content = (folder / "tokens.npy").read_bytes()
    (folder / "tokens.npy").write_bytes(content[:-10])
    with pytest.raises(InputError, match="is damaged.*delete it"):
        tokenize(texts, tokenizer)


def test_what_was_left_out_is_told_every_time(tokenizer, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "the sea"}\n{"text": " "}\n')
    for each in (tokenizer, tokenizer, ByteTokenizer()):
        found = tokenize([f"{tmp_path}/x.jsonl"], each)
        assert len(found) == 1 and found.skipped == {"empty": 1}


def test_bytes_from_the_hub_are_kept_too(monkeypatch):
    monkeypatch.setattr(tokenized, "read_documents", lambda *arguments: iter([Document("x", "the sea")]))
    assert tokenize(["hf://datasets/owner/name/x.parquet"], ByteTokenizer()).folder is not None
    monkeypatch.setattr(tokenized, "read_documents", None)  # nothing is read again
    assert tokenize(["hf://datasets/owner/name/x.parquet"], ByteTokenizer())[0].tobytes() == b"the sea"


def test_no_texts(tokenizer):
    with pytest.raises(InputError, match="texts is empty; name"):
        tokenize([], tokenizer)
