"""The score of a document is what one plain forward pass says, however it is cut and whatever is read beside it."""

import json
import math

import numpy as np
import pytest
import torch
from infini.tasks.perplexity.benchmark import PerplexitySettings, run
from infini.tasks.perplexity.score import score_documents, tokens_of_buckets

from baselines.full.model import FullTransformer
from infini import InfiniConfig, InfiniTransformer
from infini import decoder as decoder_module
from infini.data.bpe import train_bpe
from infini.errors import InputError
from infini.report.perplexity import by_position, perplexity, summary
from infini.report.tables import perplexity_table
from tests.conformance.conftest import SUBJECTS

MODELS = ("paper-delta", "long", "deltanet-sliding", "xl", "memorizing-evicting", "full", "sliding", "rmt", "gated-deltanet")
# Of these a silenced memory leaves nothing from before a token's segment.
ALONE = ("paper-linear", "paper-delta", "gamma", "xl", "xl-rotary", "full", "sliding", "rmt")
SEGMENT = 6


@pytest.fixture(params=MODELS)
def model(request):
    return SUBJECTS[request.param]().model


def draw(*lengths):
    return [torch.randint(40, (length,)).numpy().astype(np.int16) for length in lengths]


@torch.no_grad()
def losses(model, document, **options):
    """By a plain pass: of token t for t = 1 ... n - 1."""
    ids = torch.from_numpy(document.astype(np.int64))[None]
    logits, _ = model(ids[:, :-1], **options)
    return -logits[0].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)


def bucketed(values):
    found = [0.0] * len(values).bit_length()
    for t, value in enumerate(values.tolist(), start=1):
        found[int(math.log2(t))] += value
    return found


@pytest.mark.parametrize("memory", [True, False])
def test_any_cut_and_any_batch_give_a_plain_pass(model, memory):
    documents = draw(23, 61, 2, 40, 61, 5)
    options = {} if memory else {"memory": False}
    expected = [bucketed(losses(model, document, **options)) for document in documents]
    for piece in (1, 7, 1000):
        found = score_documents(model, documents, piece, memory)
        assert [len(row) for row in found] == [5, 6, 1, 6, 6, 3]
        for one, other in zip(found, expected, strict=True):
            assert np.allclose(one, other, rtol=0, atol=1e-9)
    [alone] = score_documents(model, documents[:1], 4, memory)
    assert np.allclose(alone, expected[0], rtol=0, atol=1e-9)


def test_the_buckets_are_all_there_is(model):
    [document] = draw(77)
    [found] = score_documents(model, [document])
    assert sum(found) == pytest.approx(losses(model, document).sum().item(), abs=1e-9)
    assert tokens_of_buckets(77) == [1, 2, 4, 8, 16, 32, 13] and sum(tokens_of_buckets(77)) == 76
    assert tokens_of_buckets(65) == [1, 2, 4, 8, 16, 32, 1] and tokens_of_buckets(64) == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("name", ALONE)
def test_without_memory_each_segment_is_as_if_the_document_began_there(name):
    model = SUBJECTS[name]().model
    [document] = draw(45)
    # The token that opens a segment is predicted at the end of the segment before.
    apart = [losses(model, document[start : start + SEGMENT + 1]) for start in range(0, 44, SEGMENT)]
    [found] = score_documents(model, [document], memory=False)
    assert np.allclose(found, bucketed(torch.cat(apart)), rtol=0, atol=1e-9)
    assert not np.allclose(found, score_documents(model, [document])[0], atol=1e-3)


def test_large_vocabularies_make_no_piece_shorter_and_hold_few_logits(model, monkeypatch):
    documents, widths, held = draw(61, 40), [], []
    expected = score_documents(model, documents)
    read, head = model._read, model.head.forward
    monkeypatch.setattr(decoder_module, "HELD_LOGITS", 6 * model.config.vocab_size)
    monkeypatch.setattr(model, "_read", lambda tokens, *a, **k: widths.append(tokens.shape[1]) or read(tokens, *a, **k))
    monkeypatch.setattr(model.head, "forward", lambda states: held.append(len(states)) or head(states))
    assert np.allclose(np.concatenate(score_documents(model, documents, 30)), np.concatenate(expected), rtol=0, atol=1e-9)
    assert widths == [30, 9, 21] and max(held) == 6


def test_progress_is_every_token_once(model):
    seen = []
    score_documents(model, draw(23, 9, 30), 4, progress=seen.append)
    assert sum(seen) == 22 + 8 + 29


def test_documents_without_a_target_and_broken_models_are_refused(model):
    with pytest.raises(InputError, match="document 1 has 1 tokens; nothing is predicted"):
        score_documents(model, draw(9, 1))
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="logits are not finite"):
        score_documents(model, draw(9))


# What a uniform model says of texts is known by hand.
BOOKS = {"a.txt": "one two  three\nfour", "b.txt": "naïve five " * 9}


@pytest.fixture
def folder(tmp_path):
    for name, text in BOOKS.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def uniform(vocab_size=256, **changes):
    shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, segment_length=8)
    model = InfiniTransformer(InfiniConfig(vocab_size=vocab_size, **shape | changes)).eval()
    with torch.no_grad():
        model.embedding.weight.zero_()
    return model


def test_rows_and_formulas_by_hand(folder):
    rows, data = run(uniform(), PerplexitySettings(texts=(f"{folder}/*.txt",), batch_size=1))
    assert [(row["document"], row["tokens"], row["words"], row["bytes"]) for row in rows] == [("a.txt", 18, 4, 19), ("b.txt", 107, 18, 108)]
    for row in rows:
        assert row["nll"] == pytest.approx(row["tokens"] * math.log(256), rel=1e-6) == row["nll_without_memory"]
        assert sum(cell["nll"] for cell in row["by_position"]) == pytest.approx(row["nll"], rel=1e-12)
        assert sum(cell["tokens"] for cell in row["by_position"]) == row["tokens"]
        assert row["state_bytes"] == uniform().state_bytes(row["tokens"])
        assert row["carried_numbers"] == 8 * 8 + 8 and row["carried_bytes"] == 4 * 72  # M and z of one head
    found = summary(rows)
    assert found["token_perplexity"] == pytest.approx(256, rel=1e-6) == found["token_perplexity_without_memory"]
    # 125 tokens of 8 bits stand for 22 words and 127 bytes.
    assert found["word_perplexity"] == pytest.approx(2 ** (8 * 125 / 22), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(8 * 125 / 127, rel=1e-6)
    assert found["memory_gain"] == pytest.approx(0, abs=1e-6)
    assert len(data["tokens_sha256"]) == len(data["checkpoint_sha256"]) == 64


def test_word_perplexity_is_token_perplexity_to_the_tokens_a_word():
    assert perplexity(30.0, 5) == pytest.approx(perplexity(30.0, 12) ** (12 / 5))
    assert perplexity(1e6, 1) == math.inf


def test_bits_and_words_do_not_depend_on_the_tokenizer(folder, tmp_path):
    """A model of 270 tokens that is uniform says exactly log2(270) bits a token, whatever the tokens are."""
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_bytes(train_bpe([" ".join(BOOKS.values()) + " the whale and the sea" * 9], 270))
    model = uniform(270, tokenizer=str(tmp_path / "tok"))
    rows, data = run(model, PerplexitySettings(texts=(f"{folder}/*.txt",)))
    assert [(row["words"], row["bytes"]) for row in rows] == [(4, 19), (18, 108)]
    assert all(row["tokens"] < row["bytes"] - 1 for row in rows) and "tokenizer_sha256" in data
    tokens = sum(row["tokens"] for row in rows)
    assert summary(rows)["bits_per_byte"] == pytest.approx(tokens * math.log2(270) / 127, rel=1e-6)


def test_positions_are_pooled_over_the_documents_that_reach_them():
    def row(*cells):
        cells = [{"from": 2**b, "tokens": n, "nll": nll, "nll_without_memory": 2 * nll} for b, (n, nll) in enumerate(cells)]
        return {"by_position": cells}

    first, second = by_position([row((1, 1.0), (2, 3.0)), row((1, 3.0))])
    assert (first["tokens"], first["documents"], first["token_perplexity"]) == (2, 2, pytest.approx(math.exp(2)))
    assert (second["from"], second["tokens"], second["documents"]) == (2, 2, 1)
    assert second["token_perplexity_without_memory"] == pytest.approx(math.exp(3))


def test_the_memory_is_knocked_out_only_where_that_is_asked_for_and_known(folder):
    class Protocol(torch.nn.Module):
        """A model that knows the protocol and no knock-out."""

        def __init__(self):
            super().__init__()
            self.inner = uniform()
            self.config, self.state_bytes, self.carried = self.inner.config, self.inner.state_bytes, self.inner.carried

        def forward(self, tokens, state=None, *, targets=None):
            return self.inner(tokens, state, targets=targets)

    asked = PerplexitySettings(texts=(f"{folder}/b.txt",))
    for model, settings in ((Protocol(), asked), (uniform(), PerplexitySettings(texts=asked.texts, knockout=False))):
        [row], _ = run(model, settings)
        assert row["nll"] > 0 and row["nll_without_memory"] is None
        assert all(cell["nll_without_memory"] is None for cell in row["by_position"])
        found = summary([row])
        assert found["memory_gain"] is found["token_perplexity_without_memory"] is None
        assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(texts=()), "texts is empty"),
        (dict(batch_size=0), "batch_size is 0; it must be at least 1"),
        (dict(piece=0), "piece is 0; it must be at least 1"),
        (dict(texts=("a.txt", "short.txt")), "document short.txt has fewer than 2 tokens"),
        (dict(texts=("a.txt",)), "the longest document has 19 tokens and a segment 64: no memory would ever be read"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder, monkeypatch, changes, message):
    monkeypatch.chdir(folder)
    (folder / "short.txt").write_text("x")
    with pytest.raises(InputError, match=message):
        run(uniform(segment_length=64), PerplexitySettings(**dict(texts=("b.txt",)) | changes))


@pytest.mark.parametrize(("size", "read"), [(17, False), (18, True)])
def test_the_last_token_of_a_document_is_predicted_and_not_read(tmp_path, size, read):
    """So a memory of segments of 16 is asked from the 18th token on."""
    (tmp_path / "a.txt").write_text("x" * size)
    settings = PerplexitySettings(texts=(f"{tmp_path}/a.txt",))
    if read:
        assert run(uniform(segment_length=16), settings)[0][0]["nll_without_memory"] is not None
    else:
        with pytest.raises(InputError, match="the longest document has 17 tokens and a segment 16: no memory would ever be read"):
            run(uniform(segment_length=16), settings)


def test_what_the_memory_saves_by_hand():
    found = summary([{"tokens": 4, "words": 2, "bytes": 8, "nll": 1.0, "nll_without_memory": 3.0}] * 2)
    assert found["memory_gain"] == 0.5 and found["word_perplexity_without_memory"] == pytest.approx(math.exp(6 / 4))
    assert found["token_perplexity_without_memory"] == pytest.approx(math.exp(6 / 8))


def test_the_table_tells_each_number_in_its_column_and_the_largest_state():
    sizes = {"carried_numbers": 2**20, "carried_bytes": 2**22, "state_bytes": 2**23}
    row = {"model": "m", "document": "x", "tokens": 4, "words": 2, "bytes": 8, "nll": 4.0, "nll_without_memory": 8.0, "by_position": []}
    about = {"source": {"commit": "c", "dirty": False}, "machine": {"gpus": [], "cores": 1, "cpu": "x"}, "seeds": {}, "versions": {}}
    about |= {"command": "", "started": "", "seconds": 1.0}
    table = perplexity_table(about | {"rows": [row | {name: value // 2 for name, value in sizes.items()}, row | sizes]})
    # exp 1, exp 2, 1 nat, exp 2, exp 4, log2(e) / 2.
    assert "| m | 2 | 8 | 2.718 | 7.389 | 1 | 7.389 | 54.6 | 0.7213 | 1,048,576 | 4.00 | 8.00 |" in table


def test_a_row_holds_both_scores_and_what_had_crossed_a_border_when_the_last_token_was_predicted(tmp_path):
    text = "one two three four five six. "[:24]  # four segments, of which the last token is read by nobody
    (tmp_path / "a.txt").write_text(text)
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.4)
    model = FullTransformer(FullTransformer.config_class(vocab_size=256, segment_length=6, **shape)).double().eval()
    [row], _ = run(model, PerplexitySettings(texts=(f"{tmp_path}/a.txt",)))
    document = np.frombuffer(text.encode(), np.uint8)
    for name, memory in (("nll", True), ("nll_without_memory", False)):
        [expected] = score_documents(model, [document], memory=memory)
        assert row[name] == pytest.approx(sum(expected), rel=1e-9)
    assert row["nll"] != pytest.approx(row["nll_without_memory"], rel=1e-3)
    assert row["carried_numbers"] == model.carried(18).numbers < model.carried(24).numbers


def test_a_document_of_one_segment_reads_no_memory(folder):
    with pytest.raises(InputError, match="the longest document has 19 tokens and a segment 19"):
        run(uniform(segment_length=19), PerplexitySettings(texts=(f"{folder}/a.txt",)))
