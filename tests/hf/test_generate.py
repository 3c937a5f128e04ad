"""`.generate()` and what is built on it, against plain recomputation of the whole text at every step."""

import copy

import pytest
import torch
from transformers import StoppingCriteria, TextStreamer, pipeline

from infini.errors import InputError
from infini.hf import InfiniByteTokenizer, InfiniCache
from infini.session import StreamingSession
from tests.hf.conftest import LONG


@pytest.fixture(params=[{}, LONG], ids=["paper", "long"])
def model(request, make):
    return make(**request.param)


@torch.no_grad()
def greedy(model, row, steps):
    """The likeliest continuation of `row` `[tokens]`, nothing kept from step to step."""
    row = row.unsqueeze(0)
    for _ in range(steps):
        row = torch.cat([row, model.model(row, keep="last")[0].argmax(-1)], dim=1)
    return row[0, -steps:]


def padded(ids, left):
    mask = torch.ones_like(ids)
    for row, count in enumerate(left):
        mask[row, :count] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def test_greedy(model, ids):
    found = model.generate(ids, max_new_tokens=20, do_sample=False)
    expected = torch.stack([greedy(model, row, 20) for row in ids])
    assert torch.equal(found[:, 45:], expected)
    assert len(set(expected.flatten().tolist())) > 10  # the model has something to say
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False, use_cache=False), found)


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 7}])
def test_rows_with_padding_on_the_left_answer_as_alone(model, ids, options):
    model.piece, left = 16, (2, 9, 31)  # every row has some
    found = model.generate(**padded(ids, left), max_new_tokens=20, do_sample=False, **options)
    for row, count in enumerate(left):
        assert torch.equal(found[row, 45:], greedy(model, ids[row, count:], 20))


def test_sampling_follows_the_model(model, ids):
    torch.manual_seed(3)
    found = model.generate(ids[:1], max_new_tokens=1, do_sample=True, num_return_sequences=1500, top_k=0)[:, -1]
    expected = model.model(ids[:1], keep="last")[0].softmax(-1)[0, 0]
    share = torch.bincount(found, minlength=256) / 1500
    assert (share - expected).abs().max() < 4 * (expected.max() * (1 - expected.max()) / 1500) ** 0.5
    assert len(found.unique()) > 5
    torch.manual_seed(3)
    again = model.generate(ids[:1], max_new_tokens=1, do_sample=True, num_return_sequences=1500, top_k=0)[:, -1]
    assert torch.equal(found, again)


def test_several_answers_to_one_prompt_are_the_same_when_greedy_and_each_its_own_when_not(model, ids):
    torch.manual_seed(0)
    found = model.generate(ids[:1], max_new_tokens=12, do_sample=True, num_return_sequences=5)
    assert len({tuple(row) for row in found[:, 45:].tolist()}) > 1


def test_beams_find_what_they_find_without_a_cache(model, ids):
    asked = dict(max_new_tokens=10, num_beams=4, do_sample=False, num_return_sequences=2, length_penalty=0.0)
    rows = padded(ids, (0, 9, 31))
    found = model.generate(**rows, **asked)
    assert torch.equal(found, model.generate(**rows, use_cache=False, **asked))
    assert not torch.equal(found[::2], model.generate(**rows, max_new_tokens=10, do_sample=False))  # beams matter here


def test_a_streamer_gets_the_text_and_criteria_stop(model):
    tokenizer = InfiniByteTokenizer()
    prompt = tokenizer("a short text to go on from", return_tensors="pt")

    class Listener(TextStreamer):
        heard = ""

        def on_finalized_text(self, text, stream_end=False):
            self.heard += text

    listener = Listener(tokenizer, skip_prompt=True)
    found = model.generate(**prompt, max_new_tokens=20, do_sample=False, streamer=listener)
    answer = found[0, prompt.input_ids.shape[1] :]
    assert listener.heard == tokenizer.decode(answer)

    class After(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return ids[:, -1] == answer[6]

    stopped = model.generate(**prompt, max_new_tokens=20, do_sample=False, stopping_criteria=[After()])
    first = answer.tolist().index(answer[6]) + 1
    assert torch.equal(stopped[0, prompt.input_ids.shape[1] :], answer[:first])
    with_eos = model.generate(**prompt, max_new_tokens=20, do_sample=False, eos_token_id=int(answer[6]), pad_token_id=0)
    assert torch.equal(with_eos, stopped)


def test_strings_stop_too(model, tmp_path):
    tokenizer = InfiniByteTokenizer()
    prompt = tokenizer("a short text to go on from", return_tensors="pt")
    with torch.no_grad():
        model.model.embedding.weight[128:] = 0  # every byte a letter of its own
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt.input_ids.shape[1] :])
    stop = answer[5:7]
    found = model.generate(**prompt, max_new_tokens=20, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    assert tokenizer.decode(found[0, prompt.input_ids.shape[1] :]) == answer[: answer.index(stop) + 2] != answer
    model.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path))
    asked = dict(max_new_tokens=20, do_sample=False, return_full_text=False, stop_sequence=stop)
    assert generator("a short text to go on from", **asked)[0]["generated_text"] == answer[: answer.index(stop) + 2]


def test_a_row_that_has_ended_does_not_disturb_the_others(model, ids):
    rows = padded(ids, (0, 9, 31))
    free = model.generate(**rows, max_new_tokens=15, do_sample=False)[:, 45:]
    end = int(free[1, 2])
    found = model.generate(**rows, max_new_tokens=15, do_sample=False, eos_token_id=end, pad_token_id=0)[:, 45:]
    for row in range(3):
        own = free[row].tolist()
        stop = own.index(end) + 1 if end in own else 15
        assert found[row, :stop].tolist() == own[:stop] and not found[row, stop:].any()


def test_many_questions_to_one_text(model, ids):
    """The text is read once; every question goes on from a copy."""
    session = StreamingSession(model.model)
    session.feed(ids[:1])
    book = InfiniCache(session.state)
    read = model.generate(ids[:1], max_new_tokens=1, return_dict_in_generate=True)
    for cache, seen in ((book, ids[:1]), (read.past_key_values, ids[:1])):
        assert cache.columns == 45
        for question in (ids[1:2, :11], ids[2:3, :5]):
            own = copy.copy(cache)
            mask = own.attention_mask(question)
            found = model.generate(question, attention_mask=mask, past_key_values=own, max_new_tokens=9, do_sample=False)
            whole = torch.cat([seen, question], dim=1)
            assert torch.equal(found[0, question.shape[1] :], greedy(model, whole[0], 9))
            full = model.generate(  # all ids once more, of which only the new ones are read
                whole, attention_mask=torch.ones_like(whole), past_key_values=copy.copy(cache), max_new_tokens=9, do_sample=False
            )
            assert torch.equal(full[0, -9:], found[0, -9:])


@pytest.mark.parametrize("repeated", [False, True], ids=["as-read", "repeated-before"])
def test_beams_and_several_answers_go_on_from_a_cache(model, ids, repeated):
    rows = padded(ids, (2, 9, 31))
    cache = InfiniCache()
    model(rows["input_ids"][:, :35], attention_mask=rows["attention_mask"][:, :35], past_key_values=cache)
    for asked in (dict(num_beams=4, num_return_sequences=2, length_penalty=0.0), dict(num_beams=1, num_return_sequences=4)):
        asked |= dict(max_new_tokens=8, do_sample=asked["num_beams"] == 1)
        torch.manual_seed(0)
        expected = model.generate(**rows, **asked)
        own = copy.copy(cache)
        if repeated:  # as transformers' own caches want it
            own.batch_repeat_interleave(4)
        torch.manual_seed(0)
        found = model.generate(ids[:, 35:], attention_mask=rows["attention_mask"], past_key_values=own, **asked)
        assert torch.equal(found[:, 10:], expected[:, 45:])
    assert cache.state.batch_size == 3


def test_going_on_from_a_padded_batch(model, ids):
    rows, more = padded(ids, (2, 9, 31)), torch.tensor([[7, 8], [9, 10], [11, 12]])
    cache = InfiniCache()
    model(**rows, past_key_values=cache)
    cache = copy.copy(cache)
    mask = cache.attention_mask(more)
    assert torch.equal(mask[:, :45], rows["attention_mask"])
    found = model.generate(more, attention_mask=mask, past_key_values=cache, max_new_tokens=9, do_sample=False)
    for row, count in enumerate((2, 9, 31)):
        assert torch.equal(found[row, 2:], greedy(model, torch.cat([ids[row, count:], more[row]]), 9))


def test_the_pipeline_from_a_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer = InfiniByteTokenizer()
    texts = ["one text", "another text, which is longer than the first"]
    generator = pipeline("text-generation", model=str(tmp_path))
    for batch_size in (1, 2):
        found = generator(texts, max_new_tokens=8, do_sample=False, return_full_text=False, batch_size=batch_size)
        for text, (answer,) in zip(texts, found):
            expected = greedy(model, torch.tensor(tokenizer(text).input_ids), 8)
            assert answer["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; generate at least 1"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3"),
        ({"inputs": None}, "the prompt is nothing"),
        ({"inputs": torch.zeros(1, 0, dtype=torch.long)}, "the prompt is \\[1, 0\\]"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1]])}, "has a hole"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}, "ends with padding; pad prompts on the left"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask is \[1, 4\]; it must be \[1, 5\], like input_ids"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask is \[2, 5\]; it must be \[1, 5\], like input_ids"),
        ({"cache_implementation": "static"}, "cache_implementation is 'static'"),
        ({"past_key_values": (1, 2)}, "past_key_values is a tuple"),
    ],
)
def test_what_cannot_be_continued_is_refused(make, ids, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        make().generate(**{"inputs": ids[:1, :5], "max_new_tokens": 3} | changes)


def test_a_cache_without_the_mask_of_what_it_has_read_is_refused(make, ids):
    model = make()
    cache = model(**padded(ids, (0, 9, 31))).past_key_values
    new = ids[:, :4]
    for mask, sentence in (
        (None, "has read 45 tokens and there is no attention_mask"),
        (torch.ones(3, 4), "give new tokens alone with attention_mask=cache.attention_mask"),
        (padded(torch.cat([ids, new], dim=1), (9, 0, 31))["attention_mask"], "counts \\[36, 45, 14\\] tokens"),  # rows exchanged
        (torch.ones(3, 49), "counts \\[45, 45, 45\\] tokens where the cache has read \\[45, 36, 14\\]"),
    ):
        with pytest.raises(InputError, match=sentence):
            model.generate(new, attention_mask=mask, past_key_values=copy.copy(cache), max_new_tokens=3)
    with pytest.raises(InputError, match="give new tokens alone"):  # all that was read, and nothing new
        model.generate(**padded(ids, (0, 9, 31)), past_key_values=copy.copy(cache), max_new_tokens=3)


def test_padding_on_the_right_of_one_row_is_enough_to_refuse(model, ids):
    mask = torch.ones_like(ids)
    mask[1, 40:] = 0
    with pytest.raises(InputError, match="ends with padding"):
        model.generate(ids, attention_mask=mask, max_new_tokens=3)


def test_assisted_decoding_is_refused(make, ids):
    model = make()
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(ids[:1], max_new_tokens=3, prompt_lookup_num_tokens=2)
