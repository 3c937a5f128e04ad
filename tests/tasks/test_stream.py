"""Documents read from their first byte to their last, by rows that go on."""

import json
import pickle

import numpy as np
import pytest
import torch
from infini.tasks.perplexity.benchmark import PerplexitySettings, run
from infini.tasks.stream import DocumentStream
from infini.tasks.text_files import read_texts

from infini import InfiniConfig, InfiniTransformer
from infini.cli.main import main
from infini.data.bpe import train_bpe
from infini.data.documents import read_documents
from infini.data.tokenizer import open_tokenizer
from infini.errors import InputError
from infini.report.perplexity import summary
from infini.train import TrainSettings, train


@pytest.fixture
def folder(tmp_path):
    """Nine documents of different lengths; of each, every byte says where it stands."""
    for i in range(9):
        (tmp_path / f"{i}.txt").write_bytes(bytes((j * (i + 3) + i) % 96 + 32 for j in range(17 + 23 * i)))
    return tmp_path


def stream(folder, **changes):
    return DocumentStream(**dict(steps=40, texts=(f"{folder}/*.txt",), segment_length=8, segments=2, rows=2) | changes)


def lanes(source, turns):
    """Each lane's bytes and resets, put together from the windows of ``turns`` batches of each stream."""
    found = []
    for number in range(source.streams):
        batches = [source[i * source.streams + number] for i in range(turns)]
        assert {batch.stream for batch in batches} == {number}
        for one, other in zip(batches, batches[1:], strict=False):
            assert torch.equal(one.tokens[:, -1], other.tokens[:, 0]) and torch.equal(one.reset[:, -1], other.reset[:, 0])
        for row in range(source.rows):
            parts = [
                np.concatenate([x[row, :-1].numpy() for x in part]) for part in ([b.tokens for b in batches], [b.reset for b in batches])
            ]
            found.append(parts)
    return found


@pytest.mark.parametrize("streams", [1, 3])
def test_an_epoch_is_every_document_once_in_whole(folder, streams):
    source = stream(folder, streams=streams)
    documents = [document.text.encode() for document in read_documents(f"{folder}/*.txt")]
    length = sum(map(len, documents)) // (2 * streams)
    parts = [(text[:length], reset[:length]) for text, reset in lanes(source, -(-length // 16))]
    text, reset = np.concatenate([text for text, _ in parts]).tobytes(), np.concatenate([reset for _, reset in parts])
    starts = set(reset.nonzero()[0].tolist())
    places = {text.find(document[: len(text) - 20]): document for document in documents if document in text}
    # All documents stand in it in whole but the last, of which as many bytes are missing as give no lane one more.
    assert len(places) >= 8 and len(text) == length * 2 * streams > sum(map(len, documents)) - 2 * streams
    assert starts == {i * length for i in range(2 * streams)} | set(places) | {max(p + len(d) for p, d in places.items())} - {len(text)}


def test_epochs_differ_in_order_and_follow_one_another(folder):
    text, reset = lanes(stream(folder, rows=1, steps=130), 125)[0]
    documents = [document.text.encode() for document in read_documents(f"{folder}/*.txt")]
    size = sum(map(len, documents))
    orders = []
    for epoch in range(2):
        part, begins = text[epoch * size : (epoch + 1) * size].tobytes(), reset[epoch * size : (epoch + 1) * size]
        orders.append([part.index(document) for document in documents])
        assert begins.nonzero()[0].tolist() == sorted(orders[-1])
    assert orders[0] != orders[1] and sorted(orders[0]) != orders[0]
    assert not torch.equal(stream(folder, rows=1, seed=1)[0].tokens, stream(folder, rows=1)[0].tokens)


def test_a_batch_depends_on_its_step_alone(folder):
    source, other = stream(folder, streams=2), pickle.loads(pickle.dumps(stream(folder, streams=2)))
    expected = [source[i] for i in range(40)]
    for i in (39, 3, 21, 0, 38):
        assert torch.equal(other[i].tokens, expected[i].tokens) and torch.equal(other[i].reset, expected[i].reset)
    assert len(source) == 40
    with pytest.raises(IndexError):
        source[40]


def test_a_window_longer_than_all_texts_goes_round(folder):
    (folder / "a").mkdir()
    (folder / "a" / "one.txt").write_text("abcde")
    batch = DocumentStream(steps=1, texts=(f"{folder}/a/one.txt",), segment_length=4, segments=4, rows=1)[0]
    assert bytes(batch.tokens[0].tolist()) == b"abcdeabcdeabcdeab"
    assert batch.reset[0].nonzero().flatten().tolist() == [0, 5, 10, 15]


def test_short_documents_are_left_out(folder):
    text = lanes(stream(folder, shortest=109, rows=1, steps=60), 60)[0][0].tobytes()
    for i, document in enumerate(read_documents(f"{folder}/*.txt")):
        assert (document.text.encode() in text) == (17 + 23 * i >= 109)


def test_documents_are_what_texts_are_joined_of(folder):
    documents = [document.text for document in read_documents(f"{folder}/*.txt")]
    assert len(documents) == 9 and read_texts(f"{folder}/*.txt") == "\n\n".join(documents)


@pytest.mark.parametrize("streams", [1, 3])
def test_the_batches_of_all_ranks_are_those_of_one_process(folder, streams):
    one = stream(folder, rows=6, streams=streams, steps=12)
    ranks = [stream(folder, rows=2, streams=streams, steps=12, rank=rank, world_size=3) for rank in range(3)]
    for step in range(12):
        parts = [source[step] for source in ranks]
        assert torch.equal(torch.cat([part.tokens for part in parts]), one[step].tokens)
        assert torch.equal(torch.cat([part.reset for part in parts]), one[step].reset)
        assert {part.stream for part in parts} == {step % streams}
    assert ranks[0].digests == one.digests


@pytest.fixture
def learned(folder, tmp_path):
    (tmp_path / "learned").mkdir()
    texts = [document.text for document in read_documents(f"{folder}/*.txt")]
    (tmp_path / "learned" / "tokenizer.json").write_bytes(train_bpe(texts, 300))
    return str(tmp_path / "learned")


def test_an_epoch_in_any_tokenizer_is_every_document_once(folder, learned):
    source, tokenizer = stream(folder, rows=1, steps=80, tokenizer=learned), open_tokenizer(learned)
    assert source[0].tokens.dtype == torch.int16 and source[0].to("cpu").tokens.dtype == torch.int64
    documents = [document.text for document in read_documents(f"{folder}/*.txt")]
    size = sum(len(tokenizer.encode(document)) for document in documents)
    assert size < 0.9 * sum(map(len, documents))
    text, reset = lanes(source, -(-size // 16))[0]
    starts = [*reset[:size].nonzero()[0].tolist(), size]
    read = [tokenizer.decode(text[a:b].tolist()) for a, b in zip(starts, starts[1:], strict=False)]
    assert sorted(read) == sorted(documents) and read != documents


def test_a_source_in_tokens_goes_to_workers_by_name(folder, learned):
    source = stream(folder, tokenizer=learned)
    other = pickle.loads(pickle.dumps(source))
    assert torch.equal(source[7].tokens, other[7].tokens) and source.digests == other.digests
    assert set(source.digests) == {"texts_sha256", "tokenizer_sha256"} and set(stream(folder).digests) == {"texts_sha256"}


def test_documents_that_are_too_short_are_counted_in_tokens(folder, learned):
    tokenizer = open_tokenizer(learned)
    sizes = sorted(len(tokenizer.encode(document.text)) for document in read_documents(f"{folder}/*.txt"))
    source = stream(folder, tokenizer=learned, shortest=sizes[4], rows=1, steps=80)
    text, reset = lanes(source, -(-sum(sizes[4:]) // 16))[0]
    assert reset[: sum(sizes[4:])].sum() == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rank=2, world_size=2), "rank is 2 of 2 processes; it must be 0 to 1"),
        (dict(world_size=0), "world_size is 0; it must be at least 1"),
        (dict(world_size=500), "981 tokens in all, for 1000 lanes"),
        (dict(tokenizer="nowhere"), "the tokenizer is 'nowhere'"),
        (dict(rows=0), "rows is 0; it must be at least 1"),
        (dict(shortest=-1), "shortest is -1"),
        (dict(texts=()), "texts is empty; name"),
        (dict(texts=("nowhere.txt",)), "nowhere.txt does not exist"),
        (dict(shortest=1000), "0 of 9 documents have 1000 tokens or more, 0 tokens in all, for 2 lanes"),
        (dict(rows=1000), "981 tokens in all, for 1000 lanes"),
        (dict(segment_length=201), "the longest document has 201 tokens and a segment 201: nothing would ever be carried over a border"),
    ],
)
def test_what_cannot_be_read_is_refused(folder, changes, message):
    with pytest.raises(InputError, match=message):
        stream(folder, **changes)


def test_a_model_learns_from_it_and_resumes_to_the_same_bits(folder, tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        return InfiniTransformer(
            InfiniConfig.long(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, segment_length=8)
        )

    class Cut(DocumentStream):
        def __getitem__(self, step):
            if step == 33:
                raise RuntimeError("power cut")
            return super().__getitem__(step)

    Cut.__module__, Cut.__qualname__ = DocumentStream.__module__, DocumentStream.__qualname__
    settings = TrainSettings(
        steps=20, accumulation=2, warmup_steps=2, learning_rate=0.02, device="cpu", precision="fp32", workers=0, checkpoint_every=8
    )
    whole, resumed = build(0), build(1)
    metrics = train(whole, stream(folder, streams=2), settings, tmp_path / "whole")
    assert metrics["loss"] < 4.6 and metrics["answer_loss"] is None  # ln 256 = 5.5, ln 96 = 4.56
    cut = Cut(**{name: getattr(stream(folder, streams=2), name) for name in DocumentStream.__dataclass_fields__})
    with pytest.raises(RuntimeError, match="power cut"):
        train(build(0), cut, settings, tmp_path / "halves")
    train(resumed, stream(folder, streams=2), settings, tmp_path / "halves")
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())


def test_the_command_trains_on_documents(folder, tmp_path, capsys):
    arguments = ["train", "debug=tiny", "task=stream", f"task.texts=['{folder}/*.txt']", "task.segments=2", "task.rows=1", "model.segment_length=64"]
    assert main([*arguments, "~task.min_segments", "~task.max_segments", "~task.tokens_per_batch", f"output={tmp_path}/run"]) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["data"]["class"] == "infini.tasks.stream.DocumentStream"


def tiny(**changes):
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, segment_length=8)
    return InfiniTransformer(InfiniConfig.long(**shape | changes))


@pytest.fixture
def held_out(folder, tmp_path):
    """Two documents that no row learns from."""
    for name, size in (("a", 150), ("b", 33)):
        (tmp_path / "held").mkdir(exist_ok=True)
        (tmp_path / "held" / f"{name}.txt").write_bytes(bytes((j * 8 + 5) % 96 + 32 for j in range(size)))
    return f"{tmp_path}/held/*.txt"


@pytest.mark.parametrize("tokenizer", ["bytes", "learned"])
def test_held_out_text_is_worth_what_perplexity_says(folder, held_out, learned, tokenizer):
    name, size = ("bytes", 256) if tokenizer == "bytes" else (learned, 300)
    source, model = stream(folder, validation_texts=(held_out,), tokenizer=name), tiny(tokenizer=name, vocab_size=size).eval()
    rows, _ = run(model, PerplexitySettings(texts=(held_out,)))
    assert pickle.loads(pickle.dumps(source)).held_out(model) == pytest.approx(summary(rows)["bits_per_byte"], rel=1e-6)
    assert sum(row["bytes"] for row in rows) == 183 and (tokenizer == "bytes" or sum(row["tokens"] for row in rows) < 150)
    assert stream(folder).held_out is None


@pytest.mark.parametrize("streams", [1, 3])
def test_epochs_are_counted_as_they_are_read(folder, streams):
    source = stream(folder, streams=streams)
    length = 981 // (2 * streams)
    read = np.concatenate([batch.tokens[:, :-1].flatten().numpy() for batch in map(source.__getitem__, range(6))])
    assert source.epochs(6) == pytest.approx(read.size / (length * 2 * streams)) and source.epochs(0) == 0


def test_what_is_held_out_is_part_of_the_run_and_not_learned_from(folder, held_out, tmp_path):
    one = stream(folder, validation_texts=(held_out,)).digests
    (tmp_path / "held" / "b.txt").write_text("something else")
    other = stream(folder, validation_texts=(held_out,)).digests
    assert one["texts_sha256"] == other["texts_sha256"] and one["validation_texts_sha256"] != other["validation_texts_sha256"]
    (tmp_path / "held" / "c.txt").write_bytes((folder / "3.txt").read_bytes())
    with pytest.raises(InputError, match="the held-out document c.txt is one of the texts that are learned from"):
        stream(folder, validation_texts=(held_out,))
    (tmp_path / "held" / "c.txt").write_text("x")
    with pytest.raises(InputError, match="the held-out document c.txt has fewer than 2 tokens"):
        stream(folder, validation_texts=(held_out,))
    with pytest.raises(InputError, match="nowhere.txt does not exist"):
        stream(folder, validation_texts=("nowhere.txt",))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_reading_held_out_text_changes_no_bit_of_training(folder, held_out, precision, tmp_path):
    settings = dict(steps=5, warmup_steps=1, learning_rate=0.02, device="cpu", precision=precision, workers=0)
    plain, watched = tiny(), tiny()
    train(plain, stream(folder, steps=5), TrainSettings(**settings), tmp_path / "plain")
    metrics = train(watched, stream(folder, steps=5, validation_texts=(held_out,)), TrainSettings(**settings, validate_every=1), tmp_path / "watched")
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in watched.state_dict().items())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        worth = stream(folder, validation_texts=(held_out,)).held_out(watched.eval())
    assert metrics["held_out_bits_per_byte"] == worth


def test_from_the_command_line_to_the_best_weights(folder, held_out, tmp_path, capsys):
    """Kept, measured alone or with all runs of a folder, and trained on from."""
    documents = ["task=stream", f"task.texts=['{folder}/*.txt']", "task.segments=2", "task.rows=1", f"task.validation_texts=['{held_out}']"]
    shape = ["model.hidden_size=16", "model.intermediate_size=24", "model.segment_length=8"]
    leave = ["~task.min_segments", "~task.max_segments", "~task.tokens_per_batch"]
    rates = ["train.steps=6", "train.validate_every=1", "train.learning_rate=1"]  # so high that the first steps are the best
    assert main(["train", "debug=tiny", *documents, *shape, *leave, *rates, f"output={tmp_path}/runs/x"]) == 0
    metrics = json.loads((tmp_path / "runs/x/record.json").read_text())["metrics"]
    assert metrics["best_step"] < 6 and metrics["best_held_out_bits_per_byte"] < metrics["held_out_bits_per_byte"]
    assert metrics["epochs"] == pytest.approx(6 * 16 / 981)

    asked = ["perplexity", f"runs={tmp_path}/runs", f"texts=['{held_out}']", "device=cpu", "picked=true"]
    assert main([*asked, "output=last"]) == 0 and main([*asked, "output=best", "best=true"]) == 0
    found = {path.parts[-2]: json.loads(path.read_text()) for path in (tmp_path / "runs").rglob("*/record.json") if path.parts[-2] != "x"}
    assert found.keys() == {"last", "best"}
    worth = {name: summary(record["rows"])["bits_per_byte"] for name, record in found.items()}
    assert worth["best"] == pytest.approx(metrics["best_held_out_bits_per_byte"], rel=1e-2)  # weights of 16 bit
    assert worth["last"] == pytest.approx(metrics["held_out_bits_per_byte"], rel=1e-2)
    assert main([*asked, "output=last", "best=true"]) == 2
    assert "choose another output" in capsys.readouterr().err
    assert main([argument for argument in asked if argument != "picked=true"] + ["output=all"]) == 0
    assert [path.parts[-3] for path in (tmp_path / "runs").rglob("all/record.json")] == ["x"]  # the best weights are no run of their own

    on = ["train", "task=stream", *documents[1:4], "train.steps=1", "train.warmup_steps=1", "train.device=cpu", "train.workers=0"]
    assert main([*on, f"runs={tmp_path}/runs", "best=true", f"output={tmp_path}/on"]) == 0, capsys.readouterr().err
    origin = json.loads((tmp_path / "on/x/record.json").read_text())["data"]["origin"]
    assert origin["weights_sha256"] == found["best"]["data"]["infini"]["checkpoint_sha256"]

    assert main(["train", "debug=tiny", *documents, *shape, *leave, f"output={tmp_path}/y"]) == 2
    assert "the data has held-out text, but validate_every is null" in capsys.readouterr().err
    assert main(["train", "debug=tiny", "train.validate_every=2", f"output={tmp_path}/y"]) == 2
    assert "the data has no held-out text: use task=stream" in capsys.readouterr().err
    assert main(["perplexity", f"runs={tmp_path}/on", f"texts=['{held_out}']", "device=cpu", "output=best", "best=true"]) == 2
    assert "it was trained without train.validate_every" in capsys.readouterr().err


def test_a_task_that_reads_other_tokens_than_the_model_is_refused(folder, learned, tmp_path, capsys):
    tiny = ["train", "debug=tiny", f"output={tmp_path}/run"]
    assert main([*tiny, f"model.tokenizer={learned}", "model.vocab_size=300", "task.tokenizer=bytes"]) == 2
    assert "but the task reads 'bytes': leave task.tokenizer out" in capsys.readouterr().err
    documents = ["task=stream", f"task.texts=['{folder}/*.txt']", "~task.min_segments", "~task.max_segments", "~task.tokens_per_batch"]
    assert main([*tiny, *documents, f"model.tokenizer={learned}", "model.segment_length=64"]) == 2
    assert "has 300 entries, the model's vocabulary 256" in capsys.readouterr().err


def test_a_run_goes_on_with_the_very_text_that_it_began_with(folder, tmp_path):
    shape = dict(vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = InfiniTransformer(InfiniConfig(**shape, segment_length=8))
    settings = TrainSettings(steps=2, warmup_steps=1, workers=0, precision="fp32")
    output = tmp_path / "run"
    train(model, stream(folder, steps=2), settings, output)
    digest = json.loads((output / "record.json").read_text())["data"]["texts_sha256"]
    assert len(digest) == 64
    (folder / "3.txt").write_bytes(b"another text, as long as it was " * 3)
    with pytest.raises(InputError, match="texts_sha256"):
        train(model, stream(folder, steps=2), settings, output)
