"""A long gap: read without gradient, worth in value what a whole text is, in gradient the memory's direct path."""

import dataclasses

import pytest
import torch
from torch.func import functional_call

from infini import InfiniConfig, InfiniTransformer, memory
from infini.data.batch import Batch, Gap
from infini.errors import InputError
from infini.memory import MemoryState
from infini.train import long_gap, train
from infini.train.long_gap import _carried, carry_on, cross, gap_loss_of
from infini.train.loss import loss_of
from infini.train.step import Parallel

N = 4


@pytest.fixture(autouse=True)
def gaps_in_pieces(monkeypatch):
    """Pieces of a batch's own size, so that small gaps take several."""
    monkeypatch.setattr(long_gap, "READ_TOKENS", 1)


RULES = ("linear", "delta", "gamma_delta", "deltanet")


def build(rule="delta", local="sliding", layers=2, **changes):
    torch.manual_seed(3)
    shape = dict(vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4)
    normed = dict(qk_norm=rule != "deltanet", write_gate=True, num_key_value_heads=2)
    model = InfiniTransformer(
        InfiniConfig(**shape, **normed, segment_length=N, update_rule=rule, local_attention=local, **changes)
    ).double()
    for name, parameter in model.named_parameters():  # gates away from the symmetric start
        if "beta" in name or "write_gate" in name:
            torch.nn.init.normal_(parameter)
    for parameter in model.parameters():  # at the starting scale of the weights hardly anything passes a memory
        parameter.data.mul_(3)
    return model


def gap_batch(position=2, segments=4, gap=7, period=5, rows=2):
    random = torch.Generator().manual_seed(5)
    tokens = torch.randint(12, (rows, segments * N + 1), generator=random)
    filler = torch.randint(12, (rows, period), generator=random, dtype=torch.uint8)
    answer = torch.zeros_like(tokens, dtype=torch.bool)
    answer[:, -3:] = True
    return Batch(tokens, answer, segments, Gap(position, gap, filler))


def in_one_text(batch):
    """Tokens read and predicted with the gap written out, and where the batch's own predictions are among them."""
    border = batch.gap.position * N
    length = batch.gap.segments * N
    filler = batch.gap.filler.repeat(1, length // batch.gap.filler.shape[1] + 1)[:, :length].long()
    text = torch.cat([batch.tokens[:, :border], filler, batch.tokens[:, border:]], dim=1)
    own = torch.ones(text.shape[1] - 1, dtype=torch.bool)
    own[border : border + length] = False
    return text, own


class Watched:
    """A model that notes its calls."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, tokens, *state, **keywords):
        self.calls.append((tokens.shape[1], torch.is_grad_enabled()))
        return self.model(tokens, *state, **keywords)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("local", ["segment", "sliding"])
@pytest.mark.parametrize("gap", [1, 4, 9])  # shorter than a piece, one piece, two and a ragged one
def test_the_value_is_that_of_the_whole_text(rule, local, gap):
    model, batch = build(rule, local), gap_batch(gap=gap)
    text, own = in_one_text(batch)
    answer = torch.zeros_like(text, dtype=torch.bool)
    answer[:, -3:] = True
    logits = model(text[:, :-1])[0]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none")
    found = gap_loss_of(model, batch)
    torch.testing.assert_close(found.tokens, losses[:, own].sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.answers, losses[:, -3:].sum(), rtol=1e-12, atol=0)

    # And the logits behind the gap.
    border = batch.gap.position * N
    _, state = model(batch.tokens[:, :border])
    state = carry_on(state, cross(model, batch, state))
    behind, end = model(batch.tokens[:, border:-1], state)
    torch.testing.assert_close(behind, logits[:, border + gap * N :], rtol=1e-12, atol=1e-12)
    assert torch.equal(end.tokens_seen, torch.full((2,), text.shape[1] - 1))


def affine_path(model, state, filler):
    """The gap read segment by segment, autograd on: only M and z carry gradient, what they multiply is held constant."""
    frozen = {name: p.detach() for name, p in model.named_parameters()}
    inner = dataclasses.replace(
        state.detach(),
        layers=tuple(
            dataclasses.replace(cut, memory=cut.memory._replace(matrix=layer.memory.matrix))
            for layer, cut in zip(state.layers, state.detach().layers, strict=True)
        ),
    )
    for piece in filler.split(N, dim=1):
        _, inner = functional_call(model, frozen, (piece, inner))
    layers = []
    for layer, end in zip(state.layers, inner.layers, strict=True):
        z = end.memory.normalizer
        z = None if z is None else z.detach() + layer.memory.normalizer - layer.memory.normalizer.detach()
        layers.append(dataclasses.replace(end, memory=MemoryState(end.memory.matrix, z)))
    return dataclasses.replace(inner, layers=tuple(layers))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("local", ["segment", "sliding"])
def test_one_layer_has_the_gradient_of_the_scan_with_frozen_features(rule, local):
    batch = gap_batch(gap=9)
    border, frozen = batch.gap.position * N, batch.gap.piece(0, 9 * N)
    gradients = []
    for walk in (
        lambda model, state: carry_on(state, cross(model, batch, state)),
        lambda model, state: affine_path(model, state, frozen),
        lambda model, state: cross(model, batch, state).end,
    ):
        model = build(rule, local, layers=1)
        first, state = model(batch.tokens[:, :border])
        behind, _ = model(batch.tokens[:, border:-1], walk(model, state))
        (first.square().sum() + behind.square().sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, found in gradients[0].items():
        torch.testing.assert_close(found, gradients[1][name], rtol=1e-9, atol=1e-10, msg=name)
    values = "blocks.0.attention.v_proj.weight"  # through which M carries what the text before says
    path = (gradients[0][values] - gradients[2][values]).norm() / gradients[0][values].norm()
    assert path > 1e-4  # and the direct path is more than rounding


def inputs(rule, segments):
    """Features, strengths and values of `segments` segments, and a memory that holds something."""
    random = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.rand(*shape, generator=random, dtype=torch.float64)

    keys, strength, values = draw(2, segments, N, 2, 5), draw(2, segments, N, 2), draw(2, segments, N, 2, 3) - 0.5
    keys = memory.unit(keys - 0.5) if rule == "deltanet" else keys
    initial = MemoryState(draw(2, 2, 5, 3), None if rule == "deltanet" else draw(2, 2, 5) + 1)
    return initial, keys, strength, values


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("segments", [1, 6, 7])
def test_the_map_is_the_derivative_of_the_scan(rule, segments):
    initial, *arguments = inputs(rule, segments)
    _, after, carried = memory.write_segments_with_map(rule, initial, *arguments)
    step = torch.rand_like(initial.matrix)  # the scan is affine in M: any difference quotient is its derivative
    _, moved = memory.write_segments(rule, initial._replace(matrix=initial.matrix + step), *arguments)
    expected = step if carried is None else carried @ step
    torch.testing.assert_close(moved.matrix - after.matrix, expected, rtol=1e-10, atol=1e-12)
    assert (carried is None) == (rule == "linear")
    for found, plain in zip(after, memory.write_segments(rule, initial, *arguments)[1], strict=True):
        assert found is None or torch.equal(found, plain)


@pytest.mark.parametrize("rule", RULES)
def test_the_map_of_deltanet_chunks_and_unwritten_segments(rule, monkeypatch):
    monkeypatch.setattr(memory, "DELTANET_CHUNK", 3)  # two chunks a segment, the second not full
    initial, *arguments = inputs(rule, 5)
    masks = {"written": torch.tensor([[True] * 5, [True, True, False, True, False]])}
    _, after, carried = memory.write_segments_with_map(rule, initial, *arguments, **masks)
    step = torch.rand_like(initial.matrix)
    moved = initial._replace(matrix=initial.matrix + step)
    _, moved = memory.write_segments(rule, moved, *arguments, **masks)
    expected = step if carried is None else carried @ step
    torch.testing.assert_close(moved.matrix - after.matrix, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_carried_into_a_document_that_begins_inside(rule, monkeypatch):
    monkeypatch.setattr(memory, "DELTANET_CHUNK", 3)
    initial, *arguments = inputs(rule, 5)
    fresh = torch.zeros(2, 5, dtype=torch.bool)
    fresh[1, 2] = True
    has = torch.ones(2, 5, dtype=torch.bool)
    has[1, 2] = False
    _, _, carried = memory.write_segments_with_map(rule, initial, *arguments, fresh=fresh, has_memory=has)
    _, _, alone = memory.write_segments_with_map(rule, initial, *arguments)
    alone = torch.eye(5, dtype=torch.float64).expand(2, 2, 5, 5) if alone is None else alone
    torch.testing.assert_close(carried[0], alone[0], rtol=1e-10, atol=1e-12)
    assert not carried[1].any()


@pytest.mark.parametrize("rule", RULES)
def test_gradient_across_a_gap_of_the_scan(rule):
    initial, *arguments = inputs(rule, 8)
    initial.matrix.requires_grad_()
    if initial.normalizer is not None:
        initial.normalizer.requires_grad_()
    arguments[2].requires_grad_()  # values of the first part reach the questions through M alone
    weight = torch.rand_like(initial.matrix)

    def part(x, start, stop):
        return x[:, start:stop]

    def first_part():
        return memory.write_segments(rule, initial, *(part(x, 0, 2) for x in arguments))[1]

    # Autograd through the gap's scan, with everything but M held constant.
    before = first_part()
    inner = before._replace(normalizer=None if before.normalizer is None else before.normalizer.detach())
    for s in range(2, 8):
        _, inner = memory.write_segments(rule, inner, *(part(x, s, s + 1).detach() for x in arguments))
        inner = inner._replace(normalizer=None if inner.normalizer is None else inner.normalizer.detach())
    wanted = torch.autograd.grad((weight * inner.matrix).sum(), (initial.matrix, arguments[2]))

    before = first_part()
    with torch.no_grad():
        _, after, carried = memory.write_segments_with_map(rule, before, *(part(x, 2, 8) for x in arguments))
    found = _carried(before, after, carried)
    assert torch.equal(found.matrix, after.matrix)
    got = torch.autograd.grad((weight * found.matrix).sum(), (initial.matrix, arguments[2]), retain_graph=True)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    if found.normalizer is not None:
        (through,) = torch.autograd.grad(found.normalizer.sum(), initial.normalizer)
        assert torch.equal(through, torch.ones_like(through))  # z' = z + sg(z_after - z)


def test_filler_is_read_in_pieces_without_gradient():
    model = Watched(build())
    batch = gap_batch(gap=11)
    gap_loss_of(model, batch)
    assert model.calls[0] == (2 * N, True)
    assert model.calls[1:-1] == [(4 * N, False), (4 * N, False), (3 * N, False)]
    assert model.calls[-1] == (2 * N, True)


def test_few_rows_are_read_in_longer_pieces(monkeypatch):
    monkeypatch.setattr(long_gap, "READ_TOKENS", 6 * N * 2 + 3)
    model = Watched(build())
    gap_loss_of(model, gap_batch(gap=11, rows=2))
    assert model.calls[1:-1] == [(6 * N, False), (5 * N, False)]


def test_memory_does_not_depend_on_the_length_of_the_gap():
    def saved_bytes(gap):
        sizes = []

        def pack(x):
            sizes.append(x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            gap_loss_of(model, gap_batch(gap=gap))
        return sum(sizes)

    model = build()
    assert saved_bytes(1) == saved_bytes(50) > 0


def test_a_layer_without_memory_goes_on_from_the_end_of_the_gap():
    model, batch = build(layers=2, memory_layers=(1,)), gap_batch(gap=3)
    _, state = model(batch.tokens[:, :8])
    crossing = cross(model, batch, state)
    assert crossing.maps[0] is None and crossing.maps[1].shape == (2, 2, 4, 4)
    state = carry_on(state, crossing)
    assert state.layers[0].memory is None and not state.layers[1].keys.requires_grad
    assert state.layers[1].memory.matrix.requires_grad


def test_recomputed_blocks_give_the_same_gradient():
    gradients = []
    for recompute in (False, True):
        model = build()
        model.enable_recompute(recompute)
        sum(gap_loss_of(model, gap_batch())).backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # by torch itself, when its compiler is imported
def test_compiled_blocks_may_have_as_many_graphs_as_gaps_and_replay_need():
    # torch's own limit; a gap in replay alone needs more. Its own way of patching: pytest's would take the option away afterwards.
    with torch._dynamo.config.patch(recompile_limit=8):
        build().enable_compile()
        assert torch._dynamo.config.recompile_limit >= 32


def test_the_schedule_chooses_by_the_batch():
    model, batch = build(), gap_batch()
    with_gap, without = Parallel().loss(model, batch), Parallel().loss(model, dataclasses.replace(batch, gap=None))
    assert torch.equal(with_gap.tokens, gap_loss_of(model, batch).tokens)
    assert torch.equal(without.tokens, loss_of(model, dataclasses.replace(batch, gap=None)).tokens)
    assert not torch.equal(with_gap.answers, without.answers)


def test_a_border_of_another_segment_length_is_refused():
    model = build()
    batch = gap_batch()
    six = Batch(batch.tokens[:, :13], batch.answer[:, :13], 2, Gap(1, 2, batch.gap.filler))  # borders at 6, the model's at 4
    with pytest.raises(InputError, match="before token 6, 2 tokens into a segment"):
        gap_loss_of(model, six)


def test_a_model_without_such_a_state_is_refused(tiny_model):
    with pytest.raises(InputError, match="carries a Tensor and not an InfiniState"):
        gap_loss_of(tiny_model(), gap_batch())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(position=4), "position can be 1 to 3"),
        (dict(rows=3), "3 rows of filler, the batch 2 rows"),
        (dict(segments=5), "not 5 whole segments"),
        (dict(answer=8), "token 8, the first after the gap, is an answer"),
    ],
)
def test_a_batch_refuses_a_gap_that_does_not_fit(change, words):
    batch = gap_batch()
    gap = Gap(change.get("position", 2), 3, torch.zeros(change.get("rows", 2), 3, dtype=torch.uint8))
    answer = batch.answer.clone()
    answer[1, change.get("answer", 9)] = True
    with pytest.raises(InputError, match=words):
        Batch(batch.tokens, answer, change.get("segments", 4), gap)


@pytest.mark.parametrize(("position", "segments"), [(0, 1), (1, 0)])
def test_a_gap_has_text_before_it_and_a_length(position, segments):
    with pytest.raises(InputError, match="must be at least 1"):
        Gap(position, segments, torch.zeros(1, 3, dtype=torch.uint8))


def test_a_gap_without_filler_is_refused():
    with pytest.raises(InputError, match="must be integers"):
        Gap(1, 1, torch.zeros(1, 0, dtype=torch.uint8))


def test_a_gap_travels_with_its_batch():
    batch = gap_batch()
    moved = dataclasses.replace(batch, tokens=batch.tokens.to(torch.uint8)).to("cpu")
    assert moved.tokens.dtype == torch.int64
    assert moved.gap.filler.dtype == torch.uint8  # widened piece by piece
    assert moved.gap.piece(3, 9).dtype == torch.int64
    assert moved.gap.piece(3, 9).tolist() == batch.gap.filler.long().repeat(1, 3)[:, 3:9].tolist()
    assert moved.to("meta").gap.filler.device.type == "meta"


@dataclasses.dataclass(frozen=True)
class FarAsk:
    """Every other batch has a gap; the row's last token repeats its first."""

    steps: int = 6

    def __len__(self):
        return self.steps

    def __getitem__(self, index):
        batch = gap_batch(gap=1 + index)
        return batch if index % 2 else dataclasses.replace(batch, gap=None)


@pytest.mark.parametrize("replay", [{}, dict(replay_segments=1)])
def test_the_loop_trains_on_gaps_and_probes_them(settings, tmp_path, replay):
    model = build().float()
    metrics = train(model, FarAsk(), settings(steps=6, precision="bf16", **replay), tmp_path)
    assert metrics["steps"] == 6 and metrics["loss"] > 0
    assert (metrics["gradient_tokens"], metrics["text_tokens"]) == (4 * N, (4 + 6) * N)
    assert metrics["knockout_token_loss"] != 0  # of the last batch, which has a gap


def test_a_gap_of_which_nothing_is_read_is_refused():
    model, batch = build(), gap_batch()
    with pytest.raises(InputError, match="read_segments is 0; at least 1 segment of a gap must be read"):
        gap_loss_of(model, batch, read_segments=0)
