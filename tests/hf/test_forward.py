"""`InfiniForCausalLM` computes what `InfiniTransformer` computes; padding on either side moves nothing."""

import copy

import pytest
import torch

from infini.errors import InputError
from infini.hf import InfiniCache
from infini.session import StreamingSession
from tests.hf.conftest import LONG


def close(one, other):
    torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


@pytest.fixture(params=[{}, LONG, {"update_rule": "delta"}], ids=["paper", "long", "delta"])
def model(request, make):
    return make(**request.param)


@torch.no_grad()
def test_logits_are_those_of_the_transformer(model, ids):
    expected, _ = model.model(ids)
    close(model(ids).logits, expected)
    close(model(ids, logits_to_keep=3).logits, expected[:, -3:])
    close(model(ids, logits_to_keep=torch.tensor([4, 40, -1])).logits, expected[:, [4, 40, 44]])
    assert model(ids, return_dict=False)[0].shape == expected.shape


@pytest.mark.parametrize("piece", [1, 7, 8, 44])
@torch.no_grad()
def test_pieces_change_nothing(model, ids, piece):
    expected, _ = model.model(ids)
    model.piece = piece
    mask = torch.ones_like(ids)
    mask[0, :19] = 0
    alone, _ = model.model(ids[:1, 19:])
    for keep in (0, 1, 5):
        logits = model(ids, logits_to_keep=keep).logits
        close(logits, expected[:, -keep:])
        padded = model(ids, attention_mask=mask, logits_to_keep=keep).logits
        close(padded[1:], expected[1:, -keep:])
        close(padded[0, -(keep or 26) :], alone[0, -keep:])


@pytest.mark.parametrize("left", [1, 8, 13, 44])
@torch.no_grad()
def test_a_padded_row_is_as_it_is_alone(model, ids, left):
    mask = torch.ones_like(ids)
    mask[1, :left] = 0
    together = model(ids, attention_mask=mask)
    close(together.logits[1, left:], model(ids[1:2, left:]).logits[0])
    close(together.logits[0], model(ids[:1]).logits[0])
    # And so do the tokens after it, one by one, through the cache.
    cache = together.past_key_values
    more = torch.tensor([[5], [6], [7]])
    for _ in range(12):
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        found = model(more, attention_mask=mask, past_key_values=cache).logits[:, -1]
    row = torch.cat([ids[1:2, left:], more[1:2].expand(1, 12)], dim=1)
    close(found[1], model(row).logits[0, -1])
    assert cache.columns == 45 + 12 and cache.state.tokens_seen.tolist() == [57, 57 - left, 57]


@torch.no_grad()
def test_padding_on_the_right_is_left_out_too(model, ids):
    mask = torch.ones_like(ids)
    mask[2, 30:] = 0
    close(model(ids, attention_mask=mask).logits[2, :30], model(ids[2:, :30]).logits[0])


@torch.no_grad()
def test_a_cache_is_a_box_around_a_value(model, ids):
    expected, _ = model.model(ids)
    cache = model(ids[:, :20]).past_key_values
    size = cache.nbytes
    for other in (copy.copy(cache), copy.deepcopy(cache)):
        close(model(ids[:, 20:], past_key_values=other).logits, expected[:, 20:])
        assert (cache.columns, other.columns) == (20, 45)
        assert other.nbytes == size == model.model.state_bytes(45, 3)
    # The other way round, from a session.
    session = StreamingSession(model.model, batch_size=3)
    session.feed(ids[:, :20])
    close(model(ids[:, 20:], past_key_values=InfiniCache(session.state)).logits, expected[:, 20:])
    cache.batch_select_indices(torch.tensor([2, 2]))
    close(model(ids[[2, 2], 20:], past_key_values=cache).logits, expected[[2, 2], 20:])
    cache.reset()
    assert cache.get_seq_length() == len(cache) == cache.nbytes == 0


@torch.no_grad()
def test_a_cache_is_filled_and_its_rows_are_counted(model, ids):
    padding = torch.zeros(3, 20, dtype=torch.bool)
    padding[1, :9] = True
    session = StreamingSession(model.model, batch_size=3)
    session.feed(ids[:, :20], padding=padding)
    cache = InfiniCache(session.state)
    assert cache.columns == 20 and torch.equal(cache.attention_mask(ids[:, 20:])[:, :20], (~padding).long())
    with pytest.raises(InputError, match="the cache has 3 rows, ids have 2; use batch_repeat_interleave"):
        cache.attention_mask(ids[:2])
    # What was read counts, also where nobody wants to go on from here.
    expected, _ = model.model(ids[:1])
    read = model(ids[:1, :20]).past_key_values
    close(model(ids[:1, 20:], past_key_values=read, use_cache=False).logits, expected[:, 20:])
    # One that is given is wanted, in training too.
    own = InfiniCache()
    model.train()(ids[:, :20], past_key_values=own)
    assert own.columns == 20


def test_the_loss_is_the_mean_over_the_labels(model, ids):
    labels = ids.clone()
    labels[0, :30] = -100
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
    close(model(ids, labels=labels).loss, expected)
    close(model(ids, labels=labels, num_items_in_batch=torch.tensor(10)).loss, expected * (15 + 88) / 10)


def test_gradients_are_those_of_the_transformer_with_recomputation_too(model, ids):
    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.train()
    logits, _ = model.model(ids)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected = gradients(loss)
    assert model(ids).past_key_values is None  # nobody goes on from a training step
    found = [gradients(model(ids, labels=ids).loss)]
    model.gradient_checkpointing = True  # as transformers sets it
    found.append(gradients(model(ids, labels=ids).loss))
    assert model.model._recompute
    for name in expected:
        for other in found:
            close(other[name], expected[name])
    model.eval()(ids)
    assert not model.model._recompute  # what is not trained pays nothing for it


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"attention_mask": [1, 1, 0, 1]}, "has a hole"),
        ({"attention_mask": [1, 1, 1]}, "attention_mask is \\[1, 3\\]; it must be \\[1, 4\\]"),
        ({"attention_mask": [1, 1, 1, 2]}, "values other than 0 and 1"),
        ({"position_ids": [0, 1, 2, 3]}, "does not take \\['position_ids'\\]"),
        ({"inputs_embeds": [0, 1, 2, 3]}, "does not take \\['inputs_embeds'\\]"),
        ({"input_ids": None}, "input_ids are missing"),
        ({"input_ids": [0, 1, 2, 256]}, "token id 256 is outside the vocabulary"),
        ({"output_attentions": True}, "output_attentions is True"),
        ({"logits_to_keep": -1}, "logits_to_keep is -1; give 0 for all columns"),
        ({"logits_to_keep": torch.tensor([4])}, r"logits_to_keep is tensor\(\[4\]\); columns are integers from -4 to 3"),
        ({"logits_to_keep": torch.tensor([True, False, True, True])}, "columns are integers from -4 to 3"),
        ({"past_key_values": "a string"}, "past_key_values is a str"),
    ],
)
def test_what_cannot_be_used_is_refused(make, changes, sentence):
    given = {"input_ids": [1, 2, 3, 4]} | changes
    tensors = {name: torch.tensor([value]) if isinstance(value, list) else value for name, value in given.items()}
    with pytest.raises(InputError, match=sentence):
        make()(**tensors)


@torch.no_grad()
def test_a_hole_that_opens_between_two_calls_is_seen(make):
    model, ids = make(), torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    cache = model(ids, attention_mask=mask).past_key_values
    longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    with pytest.raises(InputError, match="has a hole"):
        model(ids[:, :1], attention_mask=longer, past_key_values=cache)
    with pytest.raises(InputError, match="the cache has read 4: give the mask of all"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)
    with pytest.raises(InputError, match="the cache has 2 rows"):
        model(ids[:1, :1], attention_mask=torch.ones(1, 5), past_key_values=cache)
    with pytest.raises(InputError, match="cannot be cut back"):
        cache.crop(3)


@torch.no_grad()
def test_one_token_is_enough_for_a_hole_after_it(model):
    mask = torch.tensor([[1, 0]])
    cache = model(torch.tensor([[1, 2]]), attention_mask=mask).past_key_values
    with pytest.raises(InputError, match="has a hole"):
        model(torch.tensor([[3]]), attention_mask=torch.tensor([[1, 0, 1]]), past_key_values=cache)
