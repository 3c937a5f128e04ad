"""`infini generate`: a file of any size, then questions; a saved session goes on."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from infini.cli import generate
from infini.cli import main as cli
from infini.cli.build import fill
from infini.cli.compose import compose
from infini.config import InfiniConfig
from infini.data.tokenizer import ByteTokenizer
from infini.model import InfiniTransformer
from infini.session import StreamingSession

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = b"".join(b"Line %d of a book, caf\xc3\xa9 and all.\n" % i for i in range(40))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    InfiniTransformer(InfiniConfig.long(**SHAPE, segment_length=16, initializer_range=0.3)).save_pretrained(folder)
    return folder


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_bytes(TEXT)
    return tmp_path / "book.txt"


def answers(checkpoint, text, questions, count):
    """From one feed of the whole text and question."""
    model = InfiniTransformer.from_pretrained(checkpoint)
    for question in questions:
        session = StreamingSession(model)
        session.feed(list(text + question))
        yield ByteTokenizer().decode([int(token) for token in session.generate(count)])


def test_every_question_is_answered_as_if_it_alone_came_after_the_text(checkpoint, book, capsys, caplog):
    asked = ["generate", f"checkpoint={checkpoint}", "prompt_file=book.txt", "max_new_tokens=12", "piece=100"]
    assert cli.main([*asked, "questions=[Who?,What is it?]"]) == 0
    captured = capsys.readouterr()
    first, second = answers(checkpoint, TEXT, [b"\nWho?", b"\nWhat is it?"], 12)
    assert captured.out == f"Who?{first}\nWhat is it?{second}\n"
    state = InfiniTransformer.from_pretrained(checkpoint).state_bytes(len(TEXT))
    assert f"{len(TEXT):,} tokens read" in captured.err and f"state {state:,} bytes" in captured.err
    # Without questions the text itself goes on.
    assert cli.main(asked) == 0
    assert capsys.readouterr().out == next(answers(checkpoint, TEXT, [b""], 12)) + "\n"
    assert cli.main([*asked, "device=cpu", "decode=auto"]) == 0
    assert capsys.readouterr().out == next(answers(checkpoint, TEXT, [b""], 12)) + "\n" and "without a CUDA graph" in caplog.text
    # The same seed, the same sample; another, another.
    sampled = []
    for seed in (1, 1, 2):
        assert cli.main([*asked, "temperature=3", "max_new_tokens=30", f"seed={seed}"]) == 0
        sampled.append(capsys.readouterr().out)
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.fixture(scope="module")
def with_words(tmp_path_factory):
    """A model whose tokens are words, and its tokenizer."""
    pytest.importorskip("tokenizers")
    from infini.data.bpe import BPETokenizer, train_bpe

    folder = tmp_path_factory.mktemp("words")
    (folder / "tokenizer.json").write_bytes(train_bpe([TEXT.decode()], vocab_size=270))
    torch.manual_seed(0)
    config = InfiniConfig.long(
        **SHAPE, segment_length=16, initializer_range=0.3, vocab_size=270, tokenizer=str(folder / "tokenizer.json")
    )
    InfiniTransformer(config).save_pretrained(folder / "model")
    return folder / "model", BPETokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("piece", [29, 4096])
def test_a_trained_tokenizer_reads_the_file_as_if_it_were_encoded_whole(with_words, book, piece, capsys):
    folder, tokenizer = with_words
    ids = tokenizer.encode(TEXT.decode())
    assert len(ids) < 0.6 * len(TEXT)
    session = StreamingSession(InfiniTransformer.from_pretrained(folder))
    session.feed(ids)
    session.feed(tokenizer.encode("\nWho?"))
    answer = tokenizer.decode([int(token) for token in session.generate(12)])
    asked = ["generate", f"checkpoint={folder}", "prompt_file=book.txt", "max_new_tokens=12", f"piece={piece}", "questions=[Who?]"]
    assert cli.main(asked) == 0
    captured = capsys.readouterr()
    assert captured.out == f"Who?{answer}\n" and f"{len(ids):,} tokens read" in captured.err


def test_a_saved_session_of_a_trained_tokenizer_goes_on_where_a_word_may_have_grown(with_words, book, capsys):
    folder, tokenizer = with_words
    cut = len(TEXT) - len(" book, café and all.\n".encode()) - 2  # inside "a"
    asked = ["generate", f"checkpoint={folder}", "prompt_file=book.txt", "max_new_tokens=9", "session=read.st"]
    book.write_bytes(TEXT[:cut])
    assert cli.main(asked) == 0
    book.write_bytes(TEXT)
    capsys.readouterr()
    assert cli.main(asked) == 0
    session = StreamingSession(InfiniTransformer.from_pretrained(folder))
    session.feed(tokenizer.encode(TEXT.decode()))
    assert capsys.readouterr().out == tokenizer.decode([int(token) for token in session.generate(9)]) + "\n"


def test_a_text_without_words_is_cut_and_told(with_words, monkeypatch, caplog):
    monkeypatch.setattr(generate, "LONGEST_WORD", 10)
    _, tokenizer = with_words
    whole, rest = generate._cut(tokenizer, "鍵".encode() * 3)
    assert (whole, rest) == (b"", "鍵".encode() * 3) and not caplog.text
    whole, rest = generate._cut(tokenizer, "鍵".encode() * 4 + b"\xe9")
    assert whole.decode() == "鍵" * 4 and rest == b"\xe9"
    assert "13 bytes without a place between two words" in caplog.text


@pytest.mark.parametrize(("asked", "found"), [("null", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_model_reads_in_the_dtype_and_pieces_that_are_asked_for(checkpoint, book, asked, found):
    arguments = [f"checkpoint={checkpoint}", "prompt_file=book.txt", "device=cpu", f"dtype={asked}", "piece=64"]
    session, _ = generate.read(fill(generate.Command, "", compose("generate", arguments)))
    assert {parameter.dtype for parameter in session.model.parameters()} == {found} and session.piece == 64


def test_stop_ends_an_answer_wherever_it_falls(checkpoint, book, capsys):
    (free,) = answers(checkpoint, TEXT, [b""], 30)
    for start in range(0, 20, 3):
        stop = free[start : start + 2]
        if stop.isalnum():
            cli.main(["generate", f"checkpoint={checkpoint}", "prompt_file=book.txt", "max_new_tokens=30", f"stop='{stop}'"])
            assert capsys.readouterr().out == free[: free.index(stop)] + "\n"


def test_text_is_printed_when_it_is_certain():
    class Session:
        def __init__(self, text):
            self.ids, self.model = text.encode(), torch.nn.Linear(1, 1)

        def generate(self, *args, **options):
            assert args == (9, 0.5, 7, 0.9)  # as they are asked for
            return iter(self.ids)

    def parts(text, stop):
        command = type("Command", (), dict(max_new_tokens=9, temperature=0.5, top_k=7, top_p=0.9, stop=stop, seed=0, decode="eager"))
        return list(generate._answer(command, Session(text), ByteTokenizer()))

    assert parts("a\u20acb", None) == ["a", "\u20ac", "b", ""]  # no half of a character
    assert "".join(parts("abcENd", "END")) == "abcENd"
    assert "".join(parts("abcENDef", "END")) == "abc"


def test_a_saved_session_asks_at_once_and_notices_another_text_or_model(checkpoint, book, tmp_path, capsys):
    asked = ["generate", f"checkpoint={checkpoint}", "prompt_file=book.txt", "max_new_tokens=9", "session=read.st"]
    assert cli.main(asked) == 0
    first = capsys.readouterr()
    before = {path.name: path.read_bytes() for path in tmp_path.glob("read.st*")}
    assert cli.main(asked) == 0
    again = capsys.readouterr()
    assert again.out == first.out and "at once, from the saved session" in again.err
    assert {path.name: path.read_bytes() for path in tmp_path.glob("read.st*")} == before
    # The file has grown: only what is new is read.
    book.write_bytes(TEXT + b"And so on.")
    assert cli.main(asked) == 0
    assert capsys.readouterr().out == next(answers(checkpoint, TEXT + b"And so on.", [b""], 9)) + "\n"

    book.write_bytes(b"X" + TEXT[1:] + b"And so on.")
    assert cli.main(asked) == 2
    assert "read.st has read another text than book.txt; name another session file" in capsys.readouterr().err
    book.write_bytes(TEXT)  # shorter than what was read
    assert cli.main(asked) == 2
    assert "another text" in capsys.readouterr().err
    torch.manual_seed(1)
    InfiniTransformer(InfiniConfig.long(**SHAPE, segment_length=16)).save_pretrained(tmp_path / "other")
    assert cli.main([*asked, f"checkpoint={tmp_path / 'other'}"]) == 2
    assert "was read by a model with other weights" in capsys.readouterr().err
    (tmp_path / "read.st.text.json").unlink()
    assert cli.main(asked) == 2
    assert "read.st.text.json cannot be read" in capsys.readouterr().err


def test_a_session_that_cannot_be_written_is_refused_before_the_text_is_read(checkpoint, book, monkeypatch, capsys):
    asked = ["generate", f"checkpoint={checkpoint}", "prompt_file=book.txt", "max_new_tokens=9"]
    monkeypatch.setattr(StreamingSession, "feed", lambda *_: pytest.fail("the text was read"))
    assert cli.main([*asked, "session=nowhere/read.st"]) == 2
    assert "session is 'nowhere/read.st', but there is no folder" in capsys.readouterr().err
    assert cli.main([*asked, "session=."]) == 2
    assert "session is '.', which is a folder; name a file" in capsys.readouterr().err
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 5000}))
    assert cli.main([*asked, "session=read.st"]) == 2
    needed = InfiniTransformer.from_pretrained(checkpoint).state_bytes(0)
    found = re.search(r"session is 'read.st', but only 5,000 bytes are free there and it needs ([\d,]+): name", capsys.readouterr().err)
    assert needed < int(found[1].replace(",", "")) < needed + 2**17


def test_a_saved_session_is_asked_where_nothing_more_can_be_written(checkpoint, book, monkeypatch, capsys):
    asked = ["generate", f"checkpoint={checkpoint}", "prompt_file=book.txt", "max_new_tokens=9", "session=read.st"]
    assert cli.main(asked) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 0}))
    assert cli.main(asked) == 0
    assert capsys.readouterr().out == first


def test_a_full_disk_leaves_the_saved_session_as_it_was(checkpoint, book, tmp_path, monkeypatch, capsys):
    asked = ["generate", f"checkpoint={checkpoint}", "prompt_file=book.txt", "max_new_tokens=9", "session=read.st"]
    assert cli.main(asked) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("read.st*")}
    book.write_bytes(TEXT + b"And so on.")

    def no_space(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("infini.state.write_tensors", no_space)
        assert cli.main(asked) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.glob("read.st*")} == before
    capsys.readouterr()
    assert cli.main(asked) == 0
    assert capsys.readouterr().out == next(answers(checkpoint, TEXT + b"And so on.", [b""], 9)) + "\n"
    # A process that dies between the session and the note on its text leaves the note of an older one.
    (tmp_path / "read.st.text.json").write_bytes(before["read.st.text.json"])
    assert cli.main(asked) == 2
    assert "read.st.text.json is of an older save than read.st" in capsys.readouterr().err


def test_ctrl_c_while_reading_keeps_what_was_read(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = TEXT * 60
    (tmp_path / "book.txt").write_bytes(text)
    asked = ["generate", f"checkpoint={checkpoint}", "prompt_file=book.txt", "max_new_tokens=9", "session=read.st"]
    command = [sys.executable, "-m", "infini.cli.main", *asked, "piece=64"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and str(tmp_path / "book.txt") not in open_files(process.pid):
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert out == "" and "tokens are kept in read.st, the same command goes on from there" in errors
    assert cli.main([*asked, "piece=4096"]) == 0
    assert capsys.readouterr().out == next(answers(checkpoint, text, [b""], 9)) + "\n"


def open_files(pid):
    for number in os.listdir(folder := f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            yield os.readlink(f"{folder}/{number}")


def test_the_file_is_never_in_memory_whole(checkpoint, book, monkeypatch):
    fed = []
    feed = StreamingSession.feed
    monkeypatch.setattr(StreamingSession, "feed", lambda self, ids: fed.append(len(ids)) or feed(self, ids))
    command = generate.fill(
        generate.Command,
        "",
        generate.compose("generate", [f"checkpoint={checkpoint}", "prompt_file=book.txt", "piece=200"]),
    )
    generate._read_file(command, InfiniTransformer.from_pretrained(checkpoint), ByteTokenizer())
    assert max(fed) == 200 and sum(fed) == len(TEXT)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "prompt_file is missing: give prompt_file=..."),
        (["prompt_file=nowhere.txt"], "prompt_file is 'nowhere.txt'; there is no such file"),
        (["prompt_file=."], "prompt_file is '.', which is no regular file"),
        (["prompt_file=/dev/null"], "prompt_file is '/dev/null', which is no regular file"),
        (["prompt_file=empty.txt"], "prompt_file 'empty.txt' is empty"),
        (["prompt_file=book.txt", "max_new_tokens=0"], "max_new_tokens is 0; it must be at least 1"),
        (["prompt_file=book.txt", "piece=0"], "piece is 0; it must be at least 1"),
        (["prompt_file=book.txt", "stop=''"], "stop is empty"),
        (["prompt_file=book.txt", "device=cpu", "decode=graph"], "decode is 'graph', but CUDA graphs need a CUDA device"),
        (["prompt_file=book.txt", "decode=fast"], "decode is 'fast' but must be one of eager, graph, auto"),
        (["prompt_file=book.txt", "questions=Who?"], "questions is"),
        (["prompt_file=book.txt", "temperature=-1"], "temperature -1.0; neither may be negative"),
        (["prompt_file=book.txt", "top_p=2"], "top_p is 2.0"),
        (["prompt_file=book.txt", "checkpoint=nowhere"], "there is no checkpoint folder 'nowhere'"),
        (["prompt_file=book.txt", "question=[a]"], "did you mean questions?"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, checkpoint, book, capsys):
    (book.parent / "empty.txt").touch()
    assert cli.main(["generate", f"checkpoint={checkpoint}", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and sentence in error
