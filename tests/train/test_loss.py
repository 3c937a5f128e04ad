"""Which losses are summed, and that they are the same numbers however few logits exist at a time."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from baselines.full.model import FullTransformer
from baselines.gated_deltanet.model import GatedDeltaNet
from baselines.memorizing.model import MemorizingTransformer
from baselines.rmt.model import RecurrentMemoryTransformer
from baselines.transformer_xl.model import TransformerXL
from infini import InfiniTransformer, InputError
from infini.data.batch import Batch
from infini.layers.cross_entropy import token_losses
from infini.train.loss import loss_of

MODELS = [InfiniTransformer, FullTransformer, GatedDeltaNet, MemorizingTransformer, RecurrentMemoryTransformer, TransformerXL]
VOCABULARY = 96


def test_answers_count_in_both_sums_and_the_first_token_in_none():
    torch.manual_seed(0)
    tokens = torch.randint(5, (2, 4))
    answer = torch.tensor([[1, 0, 0, 1], [1, 0, 1, 0]], dtype=torch.bool)
    logits, asked = torch.randn(2, 3, 5), []
    losses = -logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]

    def model(seen, targets):
        asked.append(targets)
        return losses, None

    sums = loss_of(model, Batch(tokens, answer, segments=1))
    assert torch.equal(asked[0], tokens[:, 1:])
    torch.testing.assert_close(sums.tokens, losses.sum())
    torch.testing.assert_close(sums.answers, losses[0, 2] + losses[1, 1])


def test_the_model_sees_all_but_the_last_token():
    tokens = torch.tensor([[3, 1, 2]])
    seen = []

    def model(tokens, targets):
        seen.append(tokens.tolist())
        return torch.zeros(1, 2), None

    loss_of(model, Batch(tokens, tokens == 2, segments=1))
    assert seen == [[[3, 1]]]


def test_sixteen_bit_logits_are_summed_in_fp32():
    states, targets = torch.zeros(1, 5000, 8, dtype=torch.bfloat16), torch.zeros(1, 5000, dtype=torch.long)
    losses = token_losses(states, targets, lambda x: x, at_once=5000)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.sum(), 5000 * torch.tensor(8.0).log())


def build(model_class, **changes):
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "segment_length": 8, "initializer_range": 0.3}
    return model_class(model_class.config_class(**shape | changes))


def batch_of(rows=2, tokens=24):
    text = torch.randint(VOCABULARY, (rows, tokens + 1))
    return Batch(text, text % 5 == 0, segments=tokens // 8)


def weighed(model, batch):
    """A loss in which tokens and answers weigh differently, and its gradients."""
    sums = loss_of(model, batch)
    loss = sums.tokens / 48 + sums.answers / 7
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
    return loss, dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("model_class", MODELS)
def test_pieces_are_the_same_loss_and_gradient_in_fp64(model_class, tied):
    """48 tokens by 7: the last piece is shorter, and pieces cross rows. Also the loss of all logits at once."""
    model, batch = build(model_class, tie_word_embeddings=tied).double(), batch_of()
    whole, gradients = weighed(model, batch)
    model.loss_tokens = 7
    found, in_pieces = weighed(model, batch)
    torch.testing.assert_close(found, whole, rtol=1e-13, atol=0)
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(in_pieces[name], gradient, rtol=1e-11, atol=1e-13, msg=name)
    logits, _ = model(batch.tokens[:, :-1])
    losses = -logits.log_softmax(-1).gather(2, batch.tokens[:, 1:, None])[..., 0]
    expected = losses.sum() / 48 + (losses * batch.answer[:, 1:]).sum() / 7
    torch.testing.assert_close(whole, expected, rtol=1e-13, atol=0)


def test_pieces_under_autocast_have_its_precision():
    """The recomputed logits are those of the forward pass: 16 bit, with an fp32 loss."""
    model, batch = build(InfiniTransformer, vocab_size=512), batch_of()
    found = {}
    for pieces in (None, 7):
        model.loss_tokens = pieces
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses, _ = model(batch.tokens[:, :-1], targets=batch.tokens[:, 1:])
        assert losses.dtype == torch.float32
        found[pieces] = losses, torch.autograd.grad(losses.sum(), model.blocks[0].mlp.up_proj.weight)[0]
    torch.testing.assert_close(found[7][0], found[None][0], rtol=0, atol=0)
    torch.testing.assert_close(found[7][1], found[None][1], rtol=0.02, atol=1e-4)


def test_padding_has_no_loss_and_no_gradient():
    model, tokens = build(InfiniTransformer).double(), torch.randint(VOCABULARY, (2, 20))
    padding = torch.zeros_like(tokens, dtype=torch.bool)
    padding[0, :6] = True
    for pieces in (None, 3):
        model.loss_tokens = pieces
        losses, _ = model(tokens, padding=padding, targets=tokens.roll(-1, 1))
        alone, _ = model(tokens[:1, 6:], targets=tokens.roll(-1, 1)[:1, 6:])
        assert not losses[0, :6].any()
        torch.testing.assert_close(losses[:1, 6:], alone)


@pytest.mark.parametrize("options", [{"keep": "last"}, {"hidden": True}, {"targets": torch.zeros(1, 3).long()}])
def test_losses_are_of_all_tokens(options):
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(InputError, match="losses are of all tokens"):
        build(InfiniTransformer)(tokens, **{"targets": tokens} | options)


class Largest(TorchDispatchMode):
    """The most tokens that one tensor holds logits of."""

    found = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.dim() > 1 and VOCABULARY in x.shape:
                self.found = max(self.found, x.numel() // VOCABULARY)
        return result


def test_few_logits_exist_at_a_time_and_none_is_kept():
    """What the head's part saves for its backward pass, in bytes, and the most logits that ever are one tensor."""
    states = torch.randn(1, 4096, 8, requires_grad=True)
    head, targets = torch.nn.Linear(8, VOCABULARY, bias=False), torch.randint(VOCABULARY, (1, 4096))
    kept, rows = {}, {}
    for pieces in (4096, 128):
        saved = {}

        def pack(x, saved=saved):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), Largest() as largest:
            losses = token_losses(states, targets, head, pieces)
            losses.sum().backward()
        kept[pieces], rows[pieces] = sum(saved.values()), largest.found
    assert kept[4096] > 4096 * VOCABULARY * 4
    # States, targets and the head's weight are there anyway.
    assert rows == {4096: 4096, 128: 128}
    assert kept[128] <= states.nbytes + targets.nbytes + head.weight.nbytes + 4096 * 4
