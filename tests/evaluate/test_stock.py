"""lm-eval's own Hugging Face model, given ours: nothing is cut, and batches of 4 are batches of 1."""

import pytest
from lm_eval.api.instance import Instance

from infini.evaluate import InfiniLM

TEXTS = ["a first text, not long", "x", "a text that is longer than the others are, by far and then by some more", "two"]


@pytest.fixture
def stock(transformer):
    from lm_eval.models.huggingface import HFLM

    from infini.hf import InfiniByteTokenizer, InfiniForCausalLM, InfiniHFConfig

    model = InfiniForCausalLM(InfiniHFConfig(**transformer.config.to_dict())).eval()
    model.model.load_state_dict(transformer.state_dict())
    def wrapped(batch_size, **options):
        return HFLM(pretrained=model, tokenizer=InfiniByteTokenizer(), batch_size=batch_size, device="cpu", **options)

    return wrapped


def answers(lm, texts=TEXTS):
    options = {"until": [], "max_gen_toks": 9, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, dict(options)), i) for i, text in enumerate(texts)]
    return lm.generate_until(requests, disable_tqdm=True)


def scores(lm):
    pairs = [("the first context, longer than a segment", " yes"), ("b", " no, by no means"), ("a context", " 1"), ("c c c", " é")]
    found = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True)
    return [total for total, _ in found]


def test_batches_of_four_are_batches_of_one_and_ours(stock, transformer):
    ours = InfiniLM(pretrained=transformer, batch_size=4)
    assert answers(stock(4)) == answers(stock(1)) == answers(ours)
    assert scores(stock(4)) == pytest.approx(scores(stock(1)), rel=1e-5)
    assert scores(stock(4)) == pytest.approx(scores(ours), rel=1e-5)


def whole(lm):
    return lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(TEXTS)], disable_tqdm=True)


def test_whole_texts_are_scored_alike_after_the_same_first_token(stock, transformer):
    """Before a text stock puts the tokenizer's end, byte 0, which no training saw; the README says how it puts ours there."""
    ours = whole(InfiniLM(pretrained=transformer, batch_size=4))
    assert whole(stock(1, prefix_token_id=10)) == pytest.approx(ours, rel=1e-5)
    assert whole(stock(1)) != pytest.approx(ours, rel=1e-3)


def test_a_long_prompt_is_not_cut(stock, transformer):
    lm = stock(1)
    assert lm.max_length == 2**40
    prompt = "k" * 3000 + "." * 3000
    assert answers(lm, [prompt]) == answers(InfiniLM(pretrained=transformer), [prompt])
