"""What every model of the protocol must do, whatever it computes."""

import pytest
import torch

from infini import StreamingSession

BATCH, TOKENS = 3, 21  # at segments of 6: three full ones and an open one


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def tokens(subject):
    return torch.randint(subject.model.config.vocab_size, (BATCH, TOKENS))


def in_pieces(model, tokens, sizes, state=None, **masks):
    logits = []
    for i, piece in enumerate(tokens.split(sizes, dim=1)):
        found, state = model(piece, state, **{name: mask.split(sizes, dim=1)[i] for name, mask in masks.items()})
        logits.append(found)
    return torch.cat(logits, dim=1), state


SPLITS = pytest.mark.parametrize(
    "sizes", [[21], [1] * 21, [4, 9, 1, 7], [12, 6, 3]], ids=lambda s: "x".join(map(str, s[:5]))
)


def test_causality(subject, tokens):
    """A changed token moves no logit before it, over several segments, and moves its own and the last one."""
    whole, _ = subject.model(tokens)
    for t in range(TOKENS):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % subject.model.config.vocab_size
        logits, _ = subject.model(changed)
        moved = (logits - whole).abs().amax(-1)
        assert subject.close(logits[:, :t], whole[:, :t]), f"token {t} moves the past"
        assert (moved[:, t] > 1e-6).all(), f"token {t} does not move its own logits"
        if subject.reach is None or TOKENS - 1 - t <= subject.reach:
            assert (moved[:, -1] > 1e-9).all(), f"token {t} is forgotten at the end"


@SPLITS
def test_any_split_gives_the_same(subject, tokens, sizes):
    whole, state = subject.model(tokens)
    logits, stepped = in_pieces(subject.model, tokens, sizes)
    assert subject.close(logits, whole)
    after, _ = subject.model(tokens[:, :8], state)
    after_steps, _ = subject.model(tokens[:, :8], stepped)
    assert subject.close(after, after_steps)


@SPLITS
def test_a_document_sees_nothing_before_it(subject, tokens, sizes):
    """Packed documents equal each document alone, in every split; where documents may begin inside a piece."""
    if not subject.resets_inside:
        pytest.skip("documents begin only with a piece")
    reset = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    for row, t in [(0, 4), (0, 5), (0, 17), (1, 6), (2, 0), (2, 13)]:
        reset[row, t] = True
    logits, _ = in_pieces(subject.model, tokens, sizes, reset=reset)
    for row in range(BATCH):
        begins = sorted({0, *reset[row].nonzero().flatten().tolist()})
        for start, stop in zip(begins, [*begins[1:], TOKENS], strict=True):
            alone, _ = subject.model(tokens[row : row + 1, start:stop])
            assert subject.close(logits[row, start:stop], alone[0]), f"row {row}, document at {start}"


def test_state_reset_forgets_the_named_rows(subject, tokens):
    _, state = subject.model(tokens)
    where = torch.tensor([True, False, True])
    logits, _ = subject.model(tokens[:, :9], state.reset(where))
    anew, _ = subject.model(tokens[:, :9])
    went_on, _ = subject.model(tokens[:, :9], state)
    assert subject.close(logits[where], anew[where]) and subject.close(logits[~where], went_on[~where])
    assert not subject.close(anew, went_on)
    first = torch.zeros(BATCH, 9, dtype=torch.bool)
    first[:, 0] = where
    by_keyword, _ = subject.model(tokens[:, :9], state, reset=first)
    assert subject.close(by_keyword, logits)


def test_rows_do_not_know_each_other(subject, tokens):
    whole, state = subject.model(tokens)
    order = torch.tensor([2, 0, 1])
    permuted, _ = subject.model(tokens[order])
    assert subject.close(permuted, whole[order])
    on, _ = subject.model(tokens[order, :7], state.select(order))
    straight, _ = subject.model(tokens[:, :7], state)
    assert subject.close(on, straight[order])
    changed = tokens.clone()
    changed[0] = (changed[0] + 1) % subject.model.config.vocab_size
    others, _ = subject.model(changed)
    assert torch.equal(others[1:], whole[1:])


@SPLITS
@pytest.mark.parametrize("where", ["left", "right", "between"])
def test_padding_is_not_there(subject, tokens, sizes, where):
    """A padded row equals the row alone, wherever the padding stands, in every split."""
    padding = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    if where == "left":
        padding[0, :5], padding[1, :14] = True, True
    elif where == "right":
        padding[0, 16:], padding[1, 7:] = True, True
    else:
        padding[0, 3:9], padding[1, [0, 5, 6, 13, 20]] = True, True
    logits, state = in_pieces(subject.model, tokens, sizes, padding=padding)
    on, _ = subject.model(tokens[:, :8], state)
    for row in range(BATCH):
        real = ~padding[row]
        alone, alone_state = subject.model(tokens[row : row + 1, real])
        assert subject.close(logits[row, real], alone[0]), f"row {row}"
        alone_on, _ = subject.model(tokens[row : row + 1, :8], alone_state)
        assert subject.close(on[row], alone_on[0]), f"row {row}, the text after it"
    assert torch.isfinite(logits).all()


def test_what_is_kept(subject, tokens):
    whole, _ = subject.model(tokens)
    last, state = subject.model(tokens, keep="last")
    none, other = subject.model(tokens, keep="none")
    assert none is None and last.shape[1] == 1 and subject.close(last[:, 0], whole[:, -1])
    assert subject.close(subject.model(tokens, state)[0], subject.model(tokens, other)[0])
    padding = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    padding[0, 16:], padding[1, :4] = True, True
    last, _ = subject.model(tokens, padding=padding, keep="last")
    full, _ = subject.model(tokens, padding=padding)
    for row, t in ((0, 15), (1, 20), (2, 20)):
        assert subject.close(last[row, 0], full[row, t])
    hidden, _ = subject.model(tokens, hidden=True)
    assert hidden.shape[:2] == tokens.shape and hidden.shape[2] != whole.shape[2]
    # A state after the same text, whatever was returned of it.
    last_hidden, _ = subject.model(tokens, keep="last", hidden=True)
    assert subject.close(last_hidden[:, 0], hidden[:, -1])


def test_a_state_is_a_value(subject, tokens):
    _, state = subject.model(tokens)
    once, _ = subject.model(tokens[:, :7], state)
    copy = state.clone()
    for _ in range(2):
        again, _ = subject.model(tokens[:, :7], state)
        assert torch.equal(once, again)
    for same in (copy, state.detach(), state.to("cpu")):
        assert torch.equal(subject.model(tokens[:, :7], same)[0], once)
    assert state.batch_size == BATCH


def test_nothing_is_the_same_as_the_first_state(subject, tokens):
    assert subject.close(subject.model(tokens, subject.model.init_state(BATCH))[0], subject.model(tokens)[0])


def test_state_bytes_are_the_formula(subject):
    model = subject.model
    for tokens in (1, 6, 7, 40):
        for batch in (1, 3):
            _, state = model(torch.randint(40, (batch, tokens)), keep="none")
            assert state.nbytes == model.state_bytes(tokens, batch)
    if subject.bounded:
        assert model.state_bytes(10_000) == model.state_bytes(1_000_000)
        session = StreamingSession(model, piece=4000)
        session.feed(torch.randint(40, (10_000,)))
        assert session.state_bytes == model.state_bytes(10_000)


@pytest.mark.parametrize("border", [6, 18])
def test_what_crosses_a_border_is_declared(subject, border):
    """A declared number is one that some text sets and some next segment reads: each is moved alone, and no other matters."""
    model, rows = subject.model, 4
    declared, crosses = model.carried(border), {}
    for name, parameter in model.named_parameters():
        if name.endswith("key_bias"):  # so sparse that some features are those of no token
            parameter.zero_()
    for attempt in range(20):  # sparse features and retrieval read little at a time; what is found already is not tried again
        following = torch.randint(40, (rows, 6))
        _, state = model(torch.randint(40, (rows, border)))
        fresh, (plain, _) = dict(enumerate(numbers(model.init_state(rows)))), model(following, state)
        for i, held in enumerate(numbers(state)):
            known = crosses.setdefault(i, torch.zeros(held[0].numel(), dtype=torch.bool))
            begun = fresh[i] if i in fresh and fresh[i].shape == held.shape else torch.full_like(held, -1)
            places = ((held != begun).any(0).flatten() & ~known).nonzero().flatten()
            for part in places.split(64) if len(places) else ():
                copies = nudged(state.select(torch.arange(rows).repeat(len(part))), i, part.repeat_interleave(rows))
                moved = model(following.repeat(len(part), 1), copies)[0] - plain.repeat(len(part), 1, 1)
                known[part] = (moved.abs().amax((1, 2)) > 1e-7).unflatten(0, (-1, rows)).any(1)
        found = {i: int(known.sum()) for i, known in crosses.items()}
        if attempt and sum(found.values()) >= declared.numbers:
            break
    sizes = [held.element_size() for held in numbers(state)]
    assert declared == (sum(found.values()), sum(sizes[i] * count for i, count in found.items()))


def numbers(state):
    """Its tensors but for masks and counters, which say where a row stands."""
    found = []
    mapped(state)(lambda x: found.append(x) or x)
    return [x for x in found if x.dtype != torch.bool]


def nudged(state, which, place):
    """The state with one number of its tensor `which` changed, in each row the one at `place` `[rows]`."""
    count = iter(range(10**6))

    def change(x):
        if x.dtype == torch.bool or next(count) != which:
            return x
        flat = x.flatten(1).clone()
        flat[torch.arange(len(x)), place] += 1
        return flat.view_as(x) if x.is_floating_point() else flat.view_as(x) % 40

    return mapped(state)(change)


def mapped(state):
    return getattr(state, "_map", None) or state._mapped


def test_decoding_holds_no_more_than_is_declared(subject):
    """The state with an open segment, at every token of two segments: its peak is that of the last one."""
    session = StreamingSession(subject.model)
    session.feed(torch.randint(40, (12,)))
    held = []
    for _ in session.generate(12):
        held.append(session.state_bytes)
    assert max(held) <= subject.model.state_bytes(24) and subject.model.carried(24).bytes <= subject.model.state_bytes(24)


def test_a_session_equals_one_call(subject, tokens):
    whole, _ = subject.model(tokens)
    session, steps = StreamingSession(subject.model, BATCH, piece=5), StreamingSession(subject.model, BATCH)
    for t in range(TOKENS):
        logits = steps.feed(tokens[:, t : t + 1])
        assert torch.allclose(logits, whole[:, t].float(), atol=1e-5)
    assert torch.allclose(session.feed(tokens), whole[:, -1].float(), atol=1e-5)
    assert session.tokens_seen == steps.tokens_seen == TOKENS


def test_a_session_pads_like_the_model(subject, tokens):
    padding = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    padding[0, :8], padding[1, 9:] = True, True
    logits = StreamingSession(subject.model, BATCH, piece=5).feed(tokens, padding)
    for row in range(BATCH):
        alone = StreamingSession(subject.model).feed(tokens[row, ~padding[row]])
        assert torch.allclose(logits[row], alone[0], atol=1e-5)


@pytest.mark.parametrize("at", [1, 5, 6, 7, 12, 20])
def test_a_session_is_saved_at_any_token(subject, tokens, at, tmp_path):
    if not subject.saves:
        pytest.skip("its state has no file format")
    session = StreamingSession(subject.model, BATCH)
    session.feed(tokens[:, :at])
    session.save(tmp_path / "session")
    restored = StreamingSession.restore(tmp_path / "session", subject.model)
    expected = [token.tolist() for token in session.generate(TOKENS)]
    assert [token.tolist() for token in restored.generate(TOKENS)] == expected
    assert restored.tokens_seen == session.tokens_seen == at + TOKENS
    assert torch.equal(restored.feed(tokens), session.feed(tokens))
