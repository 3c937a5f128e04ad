"""The lm-eval model: scores are those of one plain pass, answers those of a session, whatever the batch."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from infini.data.tokenizer import ByteTokenizer
from infini.errors import InputError
from infini.evaluate import InfiniLM
from infini.session import StreamingSession

TEXTS = ["a first text, not long", "x", "a text that is longer than the others are, by far and then by some more", "two"]
BATCHES = [(1, 4096), (4, 4096), (4, 7), (3, 1)]


def ask(kind, *arguments):
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


@torch.no_grad()
def plain(transformer, context, text):
    """log P(text | context) and whether it is the greedy answer, all at once in fp64."""
    ids = torch.tensor([context + text])
    chances = transformer.double()(ids[:, :-1])[0].log_softmax(-1)[0, len(context) - 1 :]
    transformer.float()
    wanted = ids[0, len(context) :]
    return chances.gather(1, wanted[:, None]).sum().item(), torch.equal(chances.argmax(-1), wanted)


@pytest.mark.parametrize(("batch_size", "piece"), BATCHES)
def test_rolling_scores_are_one_pass_over_each_text(transformer, wrap, batch_size, piece):
    found = wrap(batch_size=batch_size, piece=piece).loglikelihood_rolling(ask("loglikelihood_rolling", *[(text,) for text in TEXTS]))
    expected = [plain(transformer, [10], list(text.encode()))[0] for text in TEXTS]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("batch_size", "piece"), BATCHES)
def test_continuations_are_scored_after_their_context(transformer, wrap, batch_size, piece):
    context, other = "the first context, longer than a segment", "b"
    choices = [" yes", " no, by no means whatever", " 1", " é"]
    asked = [(context, choice) for choice in choices] + [(other, choices[0]), ("", "start")]
    found = wrap(batch_size=batch_size, piece=piece).loglikelihood(ask("loglikelihood", *asked))
    for (before, text), (total, greedy) in zip(asked, found):
        expected = plain(transformer, list(before.encode()) or [10], list(text.encode()))
        assert total == pytest.approx(expected[0], rel=1e-5) and greedy == expected[1]


def test_the_greedy_continuation_is_called_greedy(transformer, wrap):
    session = StreamingSession(transformer)
    session.feed(list(b"some context"))
    ids = [int(token) for token in session.generate(6)]
    lm = wrap(batch_size=2)
    changed = [*ids[:-1], (ids[-1] + 1) % 256]
    rows = [(("", ""), list(b"some context"), text) for text in (ids, changed)]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(rows)] == [True, False]


def test_a_shared_context_is_read_once(transformer, wrap):
    read = []
    hook = transformer.blocks[0].register_forward_pre_hook(lambda module, args: read.append(args[0].shape[0] * args[0].shape[1]))
    wrap(batch_size=4).loglikelihood(ask("loglikelihood", *[("c" * 1000, choice) for choice in ("abc", "def", "ghi", "jkl")]))
    hook.remove()
    assert sum(read) == 999 + 4 * 3


def test_a_text_is_read_once_and_never_cut(transformer, wrap):
    read = []
    hook = transformer.blocks[0].register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    wrap(piece=512).loglikelihood_rolling(ask("loglikelihood_rolling", ("t" * 5000,)))
    hook.remove()
    assert sum(read) == 5000 and max(read) == 512


@pytest.mark.parametrize(("batch_size", "piece"), BATCHES)
def test_answers_are_those_of_a_session(transformer, wrap, batch_size, piece):
    found = wrap(batch_size=batch_size, piece=piece).generate_until(
        ask("generate_until", *[(text, {"until": [], "max_gen_toks": 9 + i // 3, "do_sample": False}) for i, text in enumerate(TEXTS)])
    )
    for i, (text, answer) in enumerate(zip(TEXTS, found)):
        session = StreamingSession(transformer)
        session.feed(list(text.encode()))
        assert answer == ByteTokenizer().decode([int(token) for token in session.generate(9 + i // 3)])


def test_an_answer_ends_before_its_first_stop(wrap):
    (free,) = wrap().generate_until(ask("generate_until", (TEXTS[0], {"max_gen_toks": 30})))
    third, fifth = free[3], free[5]
    (cut,) = wrap().generate_until(ask("generate_until", (TEXTS[0], {"max_gen_toks": 30, "until": [fifth, third]})))
    assert cut == free[: min(free.index(third), free.index(fifth))]
    torch.manual_seed(0)
    sampled = wrap().generate_until(ask("generate_until", (TEXTS[0], {"max_gen_toks": 30, "do_sample": True, "temperature": 2.0})))
    assert sampled[0] != free


def test_importing_registers_the_model_and_keeps_the_others():
    assert get_model("infini") is InfiniLM
    assert get_model("hf").__name__ == "HFLM"


def test_a_shipped_model_by_name_as_the_command_line_gives_it():
    lm = InfiniLM.create_from_arg_string("pretrained=passkey-mixed-12m,dtype=bfloat16,piece=64", {"batch_size": "2", "device": "cpu"})
    assert (lm.batch_size, lm.piece, next(lm.model.parameters()).dtype) == (2, 64, torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": "auto"}, "batch_size is 'auto'; give a number"),
        ({"batch_size": -1}, "batch_size is -1; give a number"),
        ({"piece": 0}, "piece is 0; it must be at least 1"),
        ({"piece": 2.5}, "piece is 2.5; give a number"),
        ({"max_gen_toks": "many"}, "max_gen_toks is 'many'; give a number"),
        ({"dtype": "float23"}, "dtype is 'float23'"),
        ({"pretrained": "nowhere"}, "there is no checkpoint folder 'nowhere'"),
    ],
)
def test_bad_options_are_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        InfiniLM(**{"device": "cpu"} | options)


@pytest.mark.parametrize("given", ["pretrained=passkey-mixed-12m,trust_remote_code=True", {"trust_remote_code": True, "batch_size": 2}])
def test_an_unknown_argument_is_one_sentence(given):
    create = InfiniLM.create_from_arg_string if isinstance(given, str) else InfiniLM.create_from_arg_obj
    with pytest.raises(InputError) as caught:
        create(given, {"device": "cpu"})
    known = ["pretrained", "tokenizer", "batch_size", "max_batch_size", "device", "dtype", "piece", "max_gen_toks"]
    assert str(caught.value) == f"model_args has ['trust_remote_code']; this model knows {known}"


def test_bad_requests_are_refused(wrap):
    lm = wrap()
    with pytest.raises(InputError, match="a text to be scored is empty"):
        lm.loglikelihood_rolling(ask("loglikelihood_rolling", ("",)))
    with pytest.raises(InputError, match="a context is empty"):
        lm.generate_until(ask("generate_until", ("", {})))
    for name in ("max_gen_toks", "temperature", "top_k", "top_p"):
        with pytest.raises(InputError, match=f"generation_kwargs has {name}='many'; give a number"):
            lm.generate_until(ask("generate_until", ("a", {name: "many"})))
    with pytest.raises(InputError, match="do_sample='no'; give true or false"):
        lm.generate_until(ask("generate_until", ("a", {"do_sample": "no"})))
    with pytest.raises(InputError, match="generation_kwargs has \\['num_beams'\\]"):
        lm.generate_until(ask("generate_until", ("a", {"num_beams": 4})))
    small = type("Small", (), {"vocab_size": 300, "encode": None, "decode": None})()
    with pytest.raises(InputError, match="the tokenizer has 300 tokens, the model 256"):
        wrap(tokenizer=small)


def greedy_of(transformer, text, count):
    session = StreamingSession(transformer)
    session.feed(list(text.encode()))
    return [int(token) for token in session.generate(count)]


def test_a_short_greedy_continuation_is_greedy_beside_a_long_one(transformer, wrap):
    rows = [(("", ""), list(text.encode()), greedy_of(transformer, text, count)) for text, count in (("some context", 3), ("another", 9))]

    def differ(module, given, named, out):  # what a model says of padding is nobody's business
        if out[0] is not None and named.get("padding") is not None:
            out[0][..., 1:2] += 1e9 * named["padding"].unsqueeze(-1)

    hook = transformer.register_forward_hook(differ, with_kwargs=True)
    try:
        assert [greedy for _, greedy in wrap(batch_size=2)._loglikelihood_tokens(rows)] == [True, True]
    finally:
        hook.remove()


def test_a_stop_in_one_answer_ends_no_other(transformer, wrap):
    def answer(*texts, **options):
        return wrap(batch_size=2).generate_until(ask("generate_until", *[(text, {"max_gen_toks": 20} | options) for text in texts]))

    early, late = TEXTS[0], TEXTS[2]
    free = answer(early, late)
    stop = next(letter for letter in free[0] if letter not in free[1])
    assert answer(early, late, until=[stop]) == [free[0][: free[0].index(stop)], free[1]]
    assert answer(early, do_sample=True, temperature=2.0, top_k=1) == free[:1]


def test_the_longest_answer_is_the_models_where_a_task_says_none(transformer, wrap):
    (found,) = wrap(max_gen_toks=5).generate_until(ask("generate_until", (TEXTS[0], {})))
    assert found == ByteTokenizer().decode(greedy_of(transformer, TEXTS[0], 5))


def test_every_score_is_cached_under_its_own_question(wrap):
    lm, kept = wrap(batch_size=3), {}
    lm.cache_hook.add_partial = lambda kind, question, result: kept.update({question: result})
    asked = [("a context", " yes"), ("a context", " no"), ("another one", " yes")]
    assert lm.loglikelihood(ask("loglikelihood", *asked)) == [kept[question] for question in asked]
