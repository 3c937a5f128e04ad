"""The step of fixed shape, kernel by kernel: the same numbers as the reference and as the model's ordinary call."""

import logging

import pytest
import torch

from infini import token_step
from infini.errors import InputError
from infini.session import StreamingSession
from infini.testing import assert_equal_to_oracle, assert_witnessed
from infini.token_step import TokenStep, captured_step
from tests.model.conftest import VARIANTS, build, run


@pytest.fixture
def uncaptured(monkeypatch):
    """Sessions that are asked for a graph take the same step without one."""
    monkeypatch.setattr(token_step, "_why_not", lambda model: None)
    monkeypatch.setattr(TokenStep, "_capture", lambda self: None)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_equals_the_reference_token_by_token_over_borders(variant, backend):
    """From an open segment, through two more borders, to a last state: logits and state."""
    model = build(variant)
    model.attention_backend = backend
    text = torch.randint(31, (19,))
    step = TokenStep(model, model(text[None, :3])[1], capture=False)
    logits = torch.cat([step.step(token[None]).clone() for token in text[3:]])
    expected, layers = run(model, text)
    assert_equal_to_oracle("logits", logits, expected[3:])
    state, (_, ordinary) = step.state(), model(text[None])
    assert state.tokens_seen.item() == 19 and state.open_length.item() == ordinary.open_length.item()
    for i, (layer, has_memory) in enumerate(zip(state.layers, model.config.has_memory, strict=True)):
        # What the open segment or the window can see; before it the line may hold an older segment.
        held = min(19, model.config.span - 1) if model.config.local_attention == "sliding" else state.open_length.item()
        for name in ("keys", "values"):
            whole = getattr(layer, name)[0]
            assert_equal_to_oracle(name, whole[len(whole) - held :], layers[i][name][len(whole) - held :])
        if has_memory:
            assert_equal_to_oracle("M", layer.memory.matrix[0], layers[i]["M"])


@pytest.mark.parametrize("variant", ["paper-linear", "delta-gated-sliding", "long", "literal-empty", "deltanet-sliding"])
@torch.no_grad()
def test_rows_at_different_places_that_pause_and_go_on(variant):
    """Every row has read another number of tokens, one nothing at all; in each step some read nothing."""
    model = build(variant)
    lengths = torch.tensor([0, 4, 5, 11])
    ids, padding = torch.randint(31, (4, 11)), torch.arange(11) >= lengths[:, None]
    logits, state = model(ids, padding=padding, keep="last")
    step = TokenStep(model, state, capture=False)
    step.load(state, logits[:, 0])
    logits = logits[:, 0]
    for i in range(17):
        active = torch.rand(4) < 0.7 if i else torch.tensor([True, False, False, False])
        tokens = torch.randint(31, (4,))
        found = step.step(tokens, active)
        if bool(active.any()):
            new, state = model(tokens[:, None], state, padding=~active[:, None], keep="last")
            logits = torch.where(active[:, None], new[:, 0], logits)
        assert_equal_to_oracle(f"step {i}", found, logits)
        mine = step.state()
        for name in ("open_length", "tokens_seen", "empty"):
            assert torch.equal(getattr(mine, name), getattr(state, name))
    for mine, ordinary in zip(step.state().layers, state.layers, strict=True):
        for name, tensor in ordinary.tensors().items():
            assert_equal_to_oracle(name, mine.tensors()[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_errs_no_more_than_the_ordinary_call(dtype):
    exact, text = build("long"), torch.randint(31, (1, 30))
    model = build("long").to(dtype)
    expected, _ = exact(text)
    _, state = model(text[:, :8])
    step, found, plain = TokenStep(model, state, capture=False), [], []
    for token in text[0, 8:]:
        found.append(step.step(token[None]).clone())
        logits, state = model(token[None, None], state)
        plain.append(logits[:, 0])
    assert_witnessed("logits", torch.stack(found, 1), torch.stack(plain, 1), expected[:, 8:])


@pytest.mark.parametrize("variant", ["paper-linear", "paper-delta", "long", "literal-empty", "deltanet-sliding"])
@torch.no_grad()
def test_kernels_read_for_rows_that_pause_and_go_on(variant, kernel_device):
    """The memory's kernels in fp32, rows that have read nothing among them, beside plain fp32 and fp64."""
    exact, lengths = build(variant), torch.tensor([0, 4, 5, 11])
    ids, padding = torch.randint(31, (4, 11)), torch.arange(11) >= lengths[:, None]
    plain, fast = build(variant).to(kernel_device, torch.float32), build(variant).to(kernel_device, torch.float32)
    plain.memory_backend, fast.memory_backend = "torch", "triton"
    steps = []
    for model in (exact, plain, fast):
        device = model.embedding.weight.device
        logits, state = model(ids.to(device), padding=padding.to(device), keep="last")
        steps.append(TokenStep(model, state, capture=False))
        steps[-1].load(state, logits[:, 0])
    assert [step._memory_backend for step in steps[1:]] == ["torch", "triton"]
    for i in range(9):
        active, tokens = torch.rand(4) < 0.7, torch.randint(31, (4,))
        oracle, expected, found = (step.step(tokens, active) for step in steps)
        assert_witnessed(f"step {i}", found.cpu(), expected.cpu(), oracle)


@torch.no_grad()
def test_the_step_between_writes_knows_no_numbers_on_the_host():
    """What a graph needs: the same operations on the same storages, whatever the rows have read."""
    model = build("long")

    def operations(read):
        step = TokenStep(model, model(torch.randint(31, (2, read)))[1], capture=False)
        with torch.profiler.profile() as profile:
            step._advance()
        return [(event.name, event.input_shapes) for event in profile.events()]

    first = operations(1)
    assert first == operations(7) == operations(23)
    assert "aten::_local_scalar_dense" not in {name for name, _ in first}


@torch.no_grad()
def test_the_memory_is_only_read_between_two_writes():
    model = build("paper-delta")
    step = TokenStep(model, model(torch.randint(31, (1, 10)))[1], capture=False)
    memory = step._layers[0].memory.matrix
    before, place = memory.clone(), memory.data_ptr()
    for _ in range(4):
        step.step(torch.tensor([3]))
        assert torch.equal(memory, before)
    step.step(torch.tensor([3]))
    assert not torch.equal(memory, before) and step._layers[0].memory.matrix.data_ptr() == place


def tokens(session, count, **options):
    return torch.stack(list(session.generate(count, **options)))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_k": 7}])
def test_a_session_writes_the_same_with_a_graph(uncaptured, options):
    model = build("long")
    ids, padding = torch.randint(31, (3, 13)), torch.arange(13) >= torch.tensor([13, 9, 2])[:, None]
    written, states = [], []
    for decode in ("eager", "graph"):
        session = StreamingSession(model, batch_size=3)
        session.feed(ids, padding)
        chance = torch.Generator().manual_seed(1)
        free = tokens(session, 12, decode=decode, generator=chance, **options)
        stop = free[4, 0].item()
        ended = tokens(session, 12, decode=decode, generator=chance, stop_ids=[stop], **options)
        session.feed(torch.tensor([[1, 2]] * 3))  # goes on from what the step holds
        written.append([free, ended, tokens(session, 7, decode=decode, generator=chance, **options)])
        states.append(session.state)
        assert session.tokens_seen == int(session.state.tokens_seen.max())
    for eager, graph in zip(*written, strict=True):
        assert torch.equal(eager, graph)
    assert len(written[0][0].unique()) > 3
    assert torch.equal(states[0].tokens_seen, states[1].tokens_seen)
    assert_equal_to_oracle("M", states[1].layers[0].memory.matrix, states[0].layers[0].memory.matrix)


def test_a_session_can_be_kept_fed_and_restarted_between_tokens(uncaptured, tmp_path):
    model = build("paper-linear")
    session, plain = StreamingSession(model), StreamingSession(model)
    for each in (session, plain):
        each.feed(list(range(13)))
    kept = session.state
    expected = [token.item() for token in plain.generate(9)]
    writer = session.generate(9, decode="graph")
    begun = [next(writer).item() for _ in range(4)]
    session.save(tmp_path / "s")
    restored = StreamingSession.restore(tmp_path / "s", model)
    assert begun + [token.item() for token in restored.generate(5)] == expected
    assert begun + [token.item() for token in writer] == expected  # asking for the state disturbs nothing
    # Between two tokens something else is read.
    writer = session.generate(9, decode="graph")
    assert next(writer) == next(plain.generate(1))
    session.feed([5, 6])
    plain.feed([5, 6])
    assert [token.item() for token in writer] == [token.item() for token in plain.generate(8)]
    # A captured step serves the next state too.
    step = session._step
    session.restart(kept)
    session.feed([7])
    plain.restart(kept)
    plain.feed([7])
    assert [t.item() for t in session.generate(8, decode="graph")] == [t.item() for t in plain.generate(8)]
    assert session._step is step and session.tokens_seen == 22


def test_a_state_that_was_asked_for_stays_while_the_session_writes_on(uncaptured):
    session = StreamingSession(build("long"))
    session.feed(list(range(13)))
    writer = session.generate(9, decode="graph")
    next(writer)
    kept = session.state
    before = kept.clone()
    assert len(list(writer)) == 8 and session.state.tokens_seen.item() == kept.tokens_seen.item() + 8
    for one, other in zip(kept.layers, before.layers, strict=True):
        assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def ends_apart(model):
    """A session of two rows that read a prompt, what they would write, and a token that only the first one writes."""
    session, prompts = StreamingSession(model, batch_size=2), torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6]])
    session.feed(prompts)
    free = tokens(session, 8)
    session.restart(model.init_state(2))
    session.feed(prompts)
    return session, free, next(int(token) for token in free[:, 0] if token not in free[:, 1])


def test_a_row_that_has_ended_keeps_what_else_it_was_fed(uncaptured):
    model, after = build("long"), []
    for decode in ("eager", "graph"):
        session, _, stop = ends_apart(model)
        writer = session.generate(8, decode=decode, stop_ids=[stop])
        while next(writer)[0] != stop:
            pass
        session.feed(torch.tensor([[5], [6]]))  # both rows, although one of them has ended
        left = list(writer)
        after.append(torch.stack([*left, *session.generate(5, decode=decode)]))
        assert left
    assert torch.equal(*after)


def test_a_session_whose_rows_ended_apart_is_restored(uncaptured, tmp_path):
    """A row that has ended is fed no more, and the session counts its tokens as the state does."""
    model = build("long")
    session, free, stop = ends_apart(model)
    tokens(session, 8, decode="graph", stop_ids=[stop])
    session.save(tmp_path / "s")
    restored = StreamingSession.restore(tmp_path / "s", model)
    assert restored.state.tokens_seen.tolist() == [4 + free[:, 0].tolist().index(stop) + 1, 12]
    assert torch.equal(tokens(restored, 5), tokens(session, 5))


def test_a_step_is_made_anew_for_other_rows_or_moved_weights(uncaptured):
    model = build("paper-linear")
    session = StreamingSession(model)
    session.feed([1, 2, 3])
    tokens(session, 3, decode="graph")
    step = session._step
    tokens(session, 3, decode="graph")
    assert session._step is step
    session.restart(model.init_state(2))
    session.feed(torch.tensor([[1], [2]]))
    tokens(session, 3, decode="graph")
    assert session._step is not step
    step = session._step
    model.blocks[0].mlp.up_proj.weight.data = model.blocks[0].mlp.up_proj.weight.data.clone()
    tokens(session, 3, decode="graph")
    assert session._step is not step


def test_what_cannot_be_captured_is_refused_or_told(caplog):
    model = build("long")
    with pytest.raises(InputError, match="decode is 'fast'; choose one of eager, graph, auto"):
        captured_step("fast", model, None)
    with pytest.raises(InputError, match="decode is 'graph', but CUDA graphs need a CUDA device, and the model is on cpu; use decode=eager"):
        captured_step("graph", model, None)
    session = StreamingSession(model)
    session.feed([1])
    with pytest.raises(InputError, match="CUDA graphs need a CUDA device"):
        session.generate(1, decode="graph")
    with caplog.at_level(logging.INFO, "infini"):
        assert len(tokens(session, 2, decode="auto")) == 2
    assert "without a CUDA graph: CUDA graphs need a CUDA device" in caplog.text
    step = TokenStep(model, model.init_state(1), capture=False)
    with pytest.raises(InputError, match="the state has 2 rows"):
        step.load(model.init_state(2))


@torch.no_grad()
def test_what_would_be_rounded_or_copied_to_every_row_is_refused():
    """As the model's ordinary call refuses it."""
    model, exact = build("paper-linear").float(), build("paper-linear")
    with pytest.raises(InputError, match=r"the state's memory is torch\.float64; this model needs torch\.float32"):
        TokenStep(model, exact.init_state(2), capture=False)
    step = TokenStep(model, model.init_state(2), capture=False)
    for given, message in (
        ([torch.tensor([1])], r"tokens are torch\.int64 \[1\]; this step takes torch\.int64 \[2\]"),
        ([torch.tensor([1.5, 2.0])], r"tokens are torch\.float32"),
        ([torch.tensor([1, 2]), torch.tensor([True])], r"active are torch\.bool \[1\]"),
        ([torch.tensor([1, 2]), torch.tensor([1, 0])], r"active are torch\.int64 \[2\]; this step takes torch\.bool"),
    ):
        with pytest.raises(InputError, match=message):
            step.step(*given)
