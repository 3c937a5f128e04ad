"""The example is true: what was read once answers tomorrow as if it had just been read."""

import pytest
import torch
from infini.tasks.examples import read_once

from infini import InfiniConfig, InfiniTransformer, StreamingSession
from infini.data.tokenizer import ByteTokenizer


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)
    InfiniTransformer(InfiniConfig.long(**shape, segment_length=16)).save_pretrained(tmp_path / "model")
    (tmp_path / "book.txt").write_bytes(b"A line of a book, caf\xc3\xa9 and all.\n" * 60)
    return tmp_path


def test_ten_questions_today_and_tomorrow(folder, capsys):
    arguments = [str(folder / "book.txt"), "--checkpoint", str(folder / "model"), "--tokens", "9"]
    assert read_once.main(arguments) == 0
    today = capsys.readouterr().out.splitlines()
    kept = (folder / "book.txt.session").stat().st_size
    assert today[0].startswith("read book.txt: 1,980 bytes, 1,980 tokens, ") and f"{kept:,} bytes" in today[1]
    assert read_once.main(arguments) == 0
    tomorrow = capsys.readouterr().out.splitlines()
    assert tomorrow[0].startswith(f"loaded book.txt.session: {kept:,} bytes, 1,980 tokens read")
    assert len(today) == 12 and len(tomorrow) == 11
    answers = [[line.rpartition(", from a copy")[0].rpartition(", ")[0] for line in lines[-10:]] for lines in (today, tomorrow)]
    assert answers[0] == answers[1]
    model = InfiniTransformer.from_pretrained(folder / "model")
    for question, line in zip(read_once.QUESTIONS, answers[0], strict=True):
        session = StreamingSession(model)
        session.feed(list((folder / "book.txt").read_bytes() + b"\n" + question.encode()))
        written = ByteTokenizer().decode([int(token) for token in session.generate(9)])
        assert line == f"{question} -> {written!r}"


def test_a_session_of_another_book_or_other_weights_is_refused(folder, capsys):
    book = folder / "book.txt"
    text = book.read_bytes()
    asked = [str(book), "--checkpoint", str(folder / "model"), "--tokens", "2", "--question", "Who?"]
    assert read_once.main(asked) == 0
    for other, sentence in (
        (b"X" + text[1:], "book.txt.session has read another text than"),
        (text[:-1], "book.txt.session has read another text than"),
        (text + b"More.", "book.txt goes on where"),
    ):
        book.write_bytes(other)
        assert read_once.main(asked) == 2
        assert sentence in (error := capsys.readouterr().err) and error.endswith("name another session file\n")
    book.write_bytes(text)
    model = InfiniTransformer.from_pretrained(folder / "model")
    with torch.no_grad():
        model.norm.weight[1] += 2**-20  # too little for the session's own look at a sample of the weights
    model.save_pretrained(folder / "model")
    assert read_once.main(asked) == 2
    assert "book.txt.session was read by a model with other weights" in capsys.readouterr().err


def test_bad_input_is_one_sentence(folder, capsys):
    assert read_once.main([str(folder / "nowhere.txt"), "--checkpoint", str(folder / "model")]) == 2
    assert "nowhere.txt" in capsys.readouterr().err
    (folder / "book.txt.session").write_bytes(b"nothing")
    assert read_once.main([str(folder / "book.txt"), "--checkpoint", str(folder / "model")]) == 2
    assert "cannot be read as a saved state" in capsys.readouterr().err
