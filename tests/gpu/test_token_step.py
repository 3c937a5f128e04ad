"""The captured step: the numbers of the same step kernel by kernel, over borders, from any place, without making the host wait."""

import copy
import warnings

import pytest
import torch

from infini.session import StreamingSession
from infini.testing import assert_witnessed
from infini.token_step import TokenStep
from tests.model.conftest import VARIANTS, build

pytestmark = pytest.mark.gpu


CASES = [(name, torch.float32) for name in VARIANTS if name != "segment-of-one"]


@pytest.mark.parametrize(("variant", "dtype"), [*CASES, ("paper-linear", torch.bfloat16), ("long", torch.bfloat16)], ids=str)
@torch.no_grad()
def test_a_graph_is_the_step(variant, dtype):
    exact = build(variant)
    model = copy.deepcopy(exact).to("cuda", dtype)
    model.attention_backend = "sdpa"
    text = torch.randint(31, (2, 40))
    padding = torch.arange(11) >= torch.tensor([11, 7])[:, None]
    start, state = text[:, :11].cuda(), None
    _, state = model(start, padding=padding.cuda())
    _, oracle = exact(text[:, :11], padding=padding)
    step, found, plain, true = TokenStep(model, state, capture=True), [], [], []
    for i in range(11, 40):
        token = text[:, i]
        found.append(step.step(token.cuda()).clone())
        logits, state = model(token[:, None].cuda(), state)
        plain.append(logits[:, 0])
        logits, oracle = exact(token[:, None], oracle)
        true.append(logits[:, 0])
    assert_witnessed("logits", torch.stack(found), torch.stack(plain), torch.stack(true), dtype)
    assert torch.equal(step.state().tokens_seen, state.tokens_seen)


@pytest.mark.parametrize("variant", ["paper-delta", "long"])
def test_a_session_writes_the_same_with_a_graph(variant):
    model = build(variant).to("cuda", torch.float32)
    ids, padding = torch.randint(31, (3, 13)), torch.arange(13) >= torch.tensor([13, 9, 2])[:, None]
    written = []
    for decode in ("eager", "graph"):
        session = StreamingSession(model, batch_size=3)
        session.feed(ids, padding)
        free = torch.stack(list(session.generate(30, decode=decode)))
        written.append(torch.cat([free, torch.stack(list(session.generate(30, stop_ids=[free[4, 0].item()], decode=decode)))]))
    assert torch.equal(*written)


def test_the_host_waits_for_tokens_alone():
    """Between two writes; the write is the model's ordinary call, which tests/gpu/test_on_cuda.py watches."""
    model = build("long", segment_length=64, window=64).to("cuda", torch.bfloat16)
    session = StreamingSession(model)
    session.feed(list(range(10)))
    answer = session.generate(40, decode="graph")
    next(answer)  # loads the step
    try:
        with warnings.catch_warnings(action="ignore"):  # it warns that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        for _ in range(30):
            next(answer)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_weights_that_change_in_place_are_used():
    model = build("paper-linear").to("cuda", torch.float32)
    session = StreamingSession(model)
    session.feed([1, 2, 3])
    state = session.state
    before = [token.item() for token in session.generate(4, decode="graph")]
    with torch.no_grad():
        model.embedding.weight.copy_(model.embedding.weight.flip(0))
    session.restart(state)
    session.feed([4])
    plain = StreamingSession(model, state=state)
    plain.feed([4])
    after = [token.item() for token in session.generate(4, decode="graph")]
    assert after == [token.item() for token in plain.generate(4)] and len(before) == 4
