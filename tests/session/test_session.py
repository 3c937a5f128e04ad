"""Sessions: reading in pieces, writing on, going on from a file, and what they refuse."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infini import InfiniConfig, InfiniTransformer, InputError, StreamingSession
from infini.session import choose_token


def make(**changes):
    torch.manual_seed(2)
    shape = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    # Untied, because a tied head of random weights repeats one token for ever.
    shape |= {"segment_length": 6, "initializer_range": 0.5, "tie_word_embeddings": False}
    return InfiniTransformer(InfiniConfig(**shape | changes)).eval()


@pytest.fixture
def model():
    return make()


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]


@pytest.mark.parametrize("prompt", [6, 12, 13, 14], ids=["one-segment", "two-segments", "and-one", "open"])
@torch.no_grad()
def test_greedy_generation_is_what_one_call_says(model, prompt):
    """Each new token is the likeliest after everything before it, prompt and open segment included, over borders."""
    session = StreamingSession(model)
    session.feed(PROMPT[:prompt])
    written = [token.item() for token in session.generate(20)]
    assert len(set(written)) > 3
    text = torch.tensor([PROMPT[:prompt] + written])
    logits, _ = model(text)
    assert logits[0, prompt - 1 : -1].argmax(-1).tolist() == written
    assert session.tokens_seen == prompt + 20


@torch.no_grad()
def test_decoding_reads_the_memory(model):
    """A token two segments back changes what is generated logits for, and silencing the memory does too."""
    other = [PROMPT[0] + 1, *PROMPT[1:]]
    a, b = StreamingSession(model), StreamingSession(model)
    a.feed(PROMPT)
    b.feed(other)
    assert (a.feed([1]) - b.feed([1])).abs().max() > 1e-5
    silent, _ = model(torch.tensor([[1]]), a.state, memory=False)
    loud, _ = model(torch.tensor([[1]]), a.state)
    assert (silent - loud).abs().max() > 1e-5


@torch.no_grad()
def test_the_memory_is_written_once_a_segment(model):
    """Decoding leaves it alone until the segment is full; a prompt of whole segments is written once."""
    session = StreamingSession(model)
    session.feed(PROMPT[:12])
    memory = session.state.layers[0].memory.matrix
    # A token more opens the third segment and writes nothing.
    _, beyond = model(torch.tensor([PROMPT[:13]]))
    assert torch.allclose(memory, beyond.layers[0].memory.matrix, atol=1e-5)
    for _ in range(5):
        session.feed([7])
        assert torch.equal(session.state.layers[0].memory.matrix, memory)
    session.feed([7])
    assert not torch.equal(session.state.layers[0].memory.matrix, memory)


def test_pieces_and_progress(model):
    seen = []
    session = StreamingSession(model, piece=5)
    session.feed(PROMPT, progress=seen.append)
    assert seen == [5, 10, 14] and session.tokens_seen == 14
    assert torch.allclose(session.feed([1]), StreamingSession(model).feed([*PROMPT, 1]), atol=1e-5)
    assert not session.feed([1]).requires_grad


def test_between_two_pieces_nothing_as_long_as_a_piece_is_computed():
    """Otherwise torch's threads are woken for each piece, and on a busy machine a GPU waits for them."""

    class Computed(TorchDispatchMode):
        sizes = ()

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            found = op(*args, **(kwargs or {}))
            if op is not torch.ops.aten.slice.Tensor:  # a view
                self.sizes += (max(x.numel() for x in tree_leaves((args, found)) if isinstance(x, torch.Tensor)),)
            return found

    class Instant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.weight = SimpleNamespace(vocab_size=256), torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens, state, **options):
            return torch.zeros(len(tokens), 1, 256), state

    state = SimpleNamespace(batch_size=3, tokens_seen=torch.zeros(3, dtype=torch.long))
    session, text = StreamingSession(Instant(), state=state, piece=1000), torch.zeros(3, 8000, dtype=torch.long)
    with Computed() as computed:
        session.feed(text)
    assert sum(size >= 3 * 1000 for size in computed.sizes) == 1  # the range of the whole text, once


def test_lists_arrays_and_narrow_integers_are_the_same(model):
    expected = StreamingSession(model).feed(PROMPT)
    narrow = [torch.tensor(PROMPT, dtype=dtype) for dtype in (torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64)]
    for ids in (torch.tensor(PROMPT), torch.tensor([PROMPT]), torch.tensor(PROMPT).numpy(), *narrow):
        assert torch.equal(StreamingSession(model).feed(ids), expected)


def test_a_row_without_tokens_keeps_its_logits(model):
    session = StreamingSession(model, batch_size=2)
    first = session.feed(torch.tensor([PROMPT, PROMPT[::-1]]))
    padding = torch.tensor([[True, True], [False, False]])
    second = session.feed(torch.tensor([[0, 0], [4, 4]]), padding)
    assert torch.equal(second[0], first[0])
    assert torch.allclose(second[1], StreamingSession(model).feed([*PROMPT[::-1], 4, 4])[0], atol=1e-5)
    assert session.state.tokens_seen.tolist() == [14, 16] and session.tokens_seen == 16


def test_a_row_that_ends_pieces_before_the_others_keeps_its_own_logits(model):
    session = StreamingSession(model, batch_size=3, piece=3)
    ids, lengths = torch.tensor([PROMPT, PROMPT[::-1], PROMPT[3:] + PROMPT[:3]]), [14, 2, 9]
    logits = session.feed(ids, torch.arange(14) >= torch.tensor(lengths)[:, None])
    for row, length in enumerate(lengths):
        assert torch.allclose(logits[row], StreamingSession(model).feed(ids[row, :length])[0], atol=1e-5)


def test_stop_ids_end_each_row_and_then_all(model):
    session = StreamingSession(model, batch_size=2)
    prompts = torch.tensor([PROMPT, PROMPT[::-1]])
    session.feed(prompts)
    free = torch.stack(list(session.generate(12)))
    stop = free[5, 0].item()
    assert stop not in free[:8, 1], "both rows would end together"
    session = StreamingSession(model, batch_size=2)
    session.feed(prompts)
    stopped = torch.stack(list(session.generate(12, stop_ids=[stop])))
    ends = [(free[:, row] == stop).nonzero().flatten()[:1].tolist() for row in range(2)]
    for row in range(2):
        end = ends[row][0] if ends[row] else 11
        assert torch.equal(stopped[: end + 1, row], free[: end + 1, row])
        assert (stopped[end + 1 :, row] == stop).all()
    first = [e[0] + 1 if e else 12 for e in ends]
    assert len(stopped) == max(first)
    # A row that is done is fed no more.
    assert session.state.tokens_seen.tolist() == [14 + n for n in first]


def test_a_session_can_stop_between_tokens(model, tmp_path):
    straight, broken = StreamingSession(model), StreamingSession(model)
    straight.feed(PROMPT)
    broken.feed(PROMPT)
    expected = [t.item() for t in straight.generate(9)]
    writer = broken.generate(9)
    begun = [next(writer).item() for _ in range(4)]
    broken.save(tmp_path / "s")
    restored = StreamingSession.restore(tmp_path / "s", model)
    assert begun + [t.item() for t in restored.generate(5)] == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s", "s.next"]


def test_a_state_goes_on_in_a_session_and_is_not_changed(model):
    with torch.no_grad():
        _, state = model(torch.tensor([PROMPT]))
    kept = state.clone()
    session = StreamingSession(model, state=state)
    expected = StreamingSession(model)
    expected.feed(PROMPT)
    assert torch.allclose(session.feed([2]), expected.feed([2]), atol=1e-5)
    assert session.tokens_seen == 15
    assert torch.equal(state.layers[1].memory.matrix, kept.layers[1].memory.matrix)


def test_sampling_follows_its_settings():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)

    def shares(**settings):
        return torch.bincount(choose_token(logits, generator=generator, **settings), minlength=4) / len(logits)

    assert torch.allclose(shares(temperature=1.0), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.02)
    assert torch.allclose(shares(temperature=1.0, top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.02)
    # 0.5 does not reach 0.6, with 0.3 it does; 0.5 alone reaches 0.5.
    assert torch.allclose(shares(temperature=1.0, top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), atol=0.02)
    assert shares(temperature=1.0, top_p=0.4).tolist() == [1, 0, 0, 0]
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert torch.allclose(shares(temperature=0.5), squared / squared.sum(), atol=0.02)
    assert shares(temperature=0.0).tolist() == [1, 0, 0, 0]


def test_sampling_is_repeatable(model):
    texts = []
    for _ in range(2):
        session = StreamingSession(model)
        session.feed(PROMPT)
        generator = torch.Generator().manual_seed(5)
        texts.append([t.item() for t in session.generate(15, temperature=1.0, generator=generator)])
    assert texts[0] == texts[1] and len(set(texts[0])) > 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0; neither may be negative"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"temperature": float("nan")}, "temperature nan; neither may be negative"),
        ({"top_p": float("nan")}, "top_p is nan; it must be above 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; it must be a whole number"),
        ({"max_new_tokens": None}, "max_new_tokens is None; it must be a whole number"),
        ({"temperature": "0.7"}, "temperature is '0.7'; it must be a number"),
        ({"temperature": None}, "temperature is None; it must be a number"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number"),
        ({"top_k": float("nan")}, "top_k is nan; it must be a whole number"),
        ({"top_p": "0.9"}, "top_p is '0.9'; it must be a number"),
        ({"stop_ids": [20]}, r"stop_ids are \[20\]; no row would ever yield what is no id from 0 to 19"),
        ({"stop_ids": [1.5]}, r"stop_ids are \[1\.5\]"),
    ],
)
def test_settings_out_of_range_are_refused(model, settings, message):
    session = StreamingSession(model)
    session.feed(PROMPT)
    with pytest.raises(InputError, match=message):
        session.generate(**{"max_new_tokens": 3} | settings)


def test_bad_text_is_refused_and_the_session_lives_on(model):
    session = StreamingSession(model)
    with pytest.raises(InputError, match="nothing was fed"):
        session.generate(3)
    session.feed(PROMPT)
    before = session.state
    for ids, message in (
        ([], "the text is empty"),
        ([3, 20], "from 3 to 20; they must be integers from 0 to 19"),
        ([-1], "from -1 to -1"),
        (torch.tensor([0.5]), "torch.float32"),
        ([float("nan")], "ids are torch.float32; they must be integers from 0 to 19"),
        (torch.tensor([True]), "ids are torch.bool"),
        (torch.zeros(2, 3, dtype=torch.long), r"this session has 1 rows"),
        (torch.zeros(1, 1, 3, dtype=torch.long), r"\[batch, tokens\]"),
        ("a text", "ids are a str, of which no tensor can be made"),
        (None, "ids are a NoneType"),
        ([[1, 2], [3]], "ids are a list, of which no tensor can be made .*rows of unequal length are padded"),
    ):
        with pytest.raises(InputError, match=message):
            session.feed(ids)
    with pytest.raises(InputError, match="every token is padding"):
        session.feed([1, 2], torch.tensor([[True, True]]))
    assert session.state is before and session.tokens_seen == 14
    with pytest.raises(InputError, match="piece is 0"):
        StreamingSession(model, piece=0)
    with pytest.raises(InputError, match="piece is 2.5; it must be a whole number"):
        StreamingSession(model, piece=2.5)
    with pytest.raises(InputError, match="batch_size is '2'; it must be a whole number"):
        StreamingSession(model, batch_size="2")
    with pytest.raises(InputError, match="batch_size is 0; a session needs at least 1 stream"):
        StreamingSession(model, batch_size=0)
    with pytest.raises(InputError, match="batch_size is 3, but the state has 2 rows"):
        StreamingSession(model, batch_size=3, state=model.init_state(2))


def test_damaged_or_foreign_files_are_refused(model, tmp_path):
    session = StreamingSession(model)
    session.feed(PROMPT)
    session.save(tmp_path / "s")
    with pytest.raises(InputError, match="belongs to another model"):
        StreamingSession.restore(tmp_path / "s", make(segment_length=7))
    with pytest.raises(InputError, match="cannot be read"):
        StreamingSession.restore(tmp_path / "none", model)
    rest = tmp_path / "s.next"
    assert set(load_file(rest)) == {"logits", "tokens_seen", "weights"}
    rest.write_bytes(rest.read_bytes()[:20])
    with pytest.raises(InputError, match=r"s\.next cannot be read .*beside the state"):
        StreamingSession.restore(tmp_path / "s", model)
    save_file({"x": torch.zeros(1)}, tmp_path / "s")
    with pytest.raises(InputError, match="not 'infini-state-1'"):
        StreamingSession.restore(tmp_path / "s", model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(local_attention="sliding", window=6), "it has local_attention=segment, .*this model local_attention=sliding"),
        (dict(rope_theta=5e5), "it has rope_theta=10000.0, this model rope_theta=500000.0"),
        (dict(gate_when_empty=True), "gate_when_empty"),
        (dict(qk_norm=True), "qk_norm"),
        (dict(rms_norm_eps=1e-5), "rms_norm_eps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_model_that_would_compute_something_else_is_refused(model, change, words, tmp_path):
    """Their states have the same tensors."""
    session, other = StreamingSession(model), make(**change)
    session.feed(PROMPT)
    session.save(tmp_path / "s")
    with pytest.raises(InputError, match=words):
        StreamingSession.restore(tmp_path / "s", other)
    with pytest.raises(InputError, match=words):
        other(torch.tensor([[1]]), session.state)


def test_other_weights_are_refused_and_the_same_in_another_dtype_are_not(model, tmp_path):
    session = StreamingSession(model)
    session.feed(PROMPT)
    session.save(tmp_path / "s")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert StreamingSession.restore(tmp_path / "s", make().to(dtype)).tokens_seen == len(PROMPT)
    for rows in (slice(0, 8), slice(8, 16)):  # wherever in a parameter
        trained = make()
        with torch.no_grad():  # as a step or two of training would
            trained.blocks[1].mlp.down_proj.weight[rows].add_(1e-3 * torch.randn(8, 16).sign())
        with pytest.raises(InputError, match="was read by a model with other weights"):
            StreamingSession.restore(tmp_path / "s", trained)


def test_an_unfed_session_is_saved_too(model, tmp_path):
    StreamingSession(model).save(tmp_path / "s")
    restored, seen = StreamingSession.restore(tmp_path / "s", model, piece=5), []
    assert torch.equal(restored.feed(PROMPT, progress=seen.append), StreamingSession(model, piece=5).feed(PROMPT))
    assert seen == [5, 10, 14]


@pytest.mark.parametrize("decode", ["eager", "auto"])
def test_a_row_that_read_nothing_here_is_not_continued(model, decode, tmp_path):
    """Its logits are unknown, also where its state has read: nothing may be made up for it."""
    with torch.no_grad():
        _, state = model(torch.tensor([PROMPT, PROMPT[::-1]]))
    second_alone = torch.tensor([[True, True], [False, False]])
    for session in (StreamingSession(model, batch_size=2), StreamingSession(model, state=state)):
        logits = session.feed(torch.tensor([[0, 0], [4, 4]]), second_alone)
        assert logits[0].isnan().all() and torch.isfinite(logits[1]).all()
        session.save(tmp_path / "s")
        for each in (session, StreamingSession.restore(tmp_path / "s", model)):
            with pytest.raises(InputError, match=r"nothing was fed to rows \[0\] of this session"):
                each.generate(3, decode=decode)
            each.feed(torch.tensor([[7], [7]]), torch.tensor([[False], [True]]))
            assert len(list(each.generate(3, decode=decode))) == 3


def test_files_of_two_saves_are_not_one_session(model, tmp_path, monkeypatch):
    """The state is written first; where the second file fails, the old one beside it is of another text."""
    session = StreamingSession(model)
    session.feed(PROMPT)
    session.save(tmp_path / "s")
    session.feed([1])

    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("infini.session.write_tensors", no_space)
    with pytest.raises(OSError, match="No space left"):
        session.save(tmp_path / "s")
    with pytest.raises(InputError, match=r"s\.next is not of the same save as .*go on from the state alone"):
        StreamingSession.restore(tmp_path / "s", model)
    alone = StreamingSession(model, state=type(session.state).load(tmp_path / "s"))
    assert torch.equal(alone.feed([2]), session.feed([2]))
