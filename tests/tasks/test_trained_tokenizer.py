"""Passkeys and recall in the tokens of a trained tokenizer: the same texts, cut as the benchmark cuts them."""

import pickle
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from infini.tasks.passkey.keys import is_held_out
from infini.tasks.passkey.needles import FILLER, NEEDLE, QUESTION, TASK
from infini.tasks.passkey.prompt import Haystack, build_prompt
from infini.tasks.passkey.training import PasskeyTraining
from infini.tasks.recall.capacity import CapacityGrid, run
from infini.tasks.recall.text import Statements
from infini.tasks.recall.training import RecallTraining

from infini.data.bpe import train_bpe
from infini.data.tokenizer import open_tokenizer
from infini.errors import InputError

ALONE = dict(recall_share_start=0.0, recall_share_end=0.0, dense_question_share=0.0)


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    """Joins words, and some of the names that recall is about (AA, not QX)."""
    draw = random.Random(0)
    said = [f"{FILLER}\nKey of {draw.choice('ABCDE') * 2} is {draw.randrange(10**5)}." for _ in range(300)]
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_bytes(train_bpe([*said, *[TASK, NEEDLE, QUESTION] * 9], 390))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(name):
    return open_tokenizer(name)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INFINI_CACHE", str(tmp_path / "cache"))


def test_a_row_is_a_prompt_of_the_benchmark_token_for_token(name, tokenizer):
    source = PasskeyTraining(steps=8, tokenizer=name, segment_length=128, max_segments=6, tokens_per_batch=768, **ALONE)
    haystack, needle = Haystack.load("repeat", tokenizer), tokenizer.encode("The pass key is ")
    for step in range(8):
        batch = source[step]
        for ids, answer in zip(batch.tokens, batch.answer, strict=True):
            marked = answer.nonzero().flatten()
            assert tokenizer.decode(ids[marked].tolist())[5:] in (".", "")  # the row's end may cut the stop
            key, end = int(tokenizer.decode(ids[marked].tolist())[:5]), int(marked[0]) - 1  # the space before the number is no answer
            assert tokenizer.decode(ids[end : end + 1].tolist()) == " " and not is_held_out(key)
            text = tokenizer.decode(ids.tolist())
            assert NEEDLE.format(key=key) in text and QUESTION + f" {key}" in text
            prompts = {
                tuple(build_prompt(tokenizer, end, depth, key, haystack, phase).ids.tolist())
                for depth in [_depth(tokenizer, ids[:end].tolist(), key, needle)]
                for phase in range(len(haystack.ids))
            }
            assert tuple(ids[:end].tolist()) in prompts


def _depth(tokenizer, ids, key, needle):
    """Share of the filler before the needle of a prompt."""
    statement = [*tokenizer.encode("\n"), *tokenizer.encode(NEEDLE.format(key=key)), *tokenizer.encode("\n")]
    at = next(i for i in range(len(ids)) if ids[i : i + len(statement)] == statement)
    head, question = len(tokenizer.encode(TASK + "\n")), len(tokenizer.encode("\n" + QUESTION))
    return (at - head) / (len(ids) - head - question - len(statement))


@pytest.mark.parametrize("kind", [RecallTraining, PasskeyTraining])
def test_recall_asks_for_what_was_said(name, tokenizer, kind):
    given = dict(pools=(3,), longest_gaps=(20,))
    if kind is PasskeyTraining:
        given = {f"recall_{key}": value for key, value in given.items()} | dict(recall_share_end=1.0)
    source = kind(steps=5, tokenizer=name, segment_length=256, max_segments=4, **given)
    for step in range(5):
        batch = source[step]
        assert batch.tokens.dtype == torch.int16
        for ids, answer in zip(batch.tokens, batch.answer, strict=True):
            said = re.findall(r"\nKey of (..) is (\d{5})\.", tokenizer.decode(ids.tolist()))
            assert len(dict(said)) == len(set(said)) == 3
            later = "".join(key for i, (name, key) in enumerate(said) if name in dict(said[:i]))
            asked = tokenizer.decode(ids[answer].tolist())
            assert asked.startswith(later) and len(asked) - len(later) <= 5  # the row's end may cut the last
            assert len(said) > 10


def test_statements_have_one_size_and_leave_out_the_names_that_have_not(tokenizer):
    statements = Statements(tokenizer)
    assert 600 < statements.names < 676  # AA to EE are tokens of their own
    said = statements.of(np.arange(statements.names), np.arange(statements.names) + 48213)
    texts = [tokenizer.decode(ids.tolist()) for ids in said]
    found = [re.fullmatch(r"\nKey of ([A-Z]{2}) is (\d{5})\.", text) for text in texts]
    assert [int(match[2]) for match in found] == list(range(48213, 48213 + statements.names))
    assert len({match[1] for match in found}) == statements.names and not {"AA", "EE"} & {match[1] for match in found}


def test_a_gap_and_natural_text_are_in_tokens_too(name, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("The sun is blue. Here we go and there is the grass again. " * 40)
    more = dict(haystacks=(str(tmp_path / "a.txt"),), text_share=1.0, number_share=0.2)
    source = PasskeyTraining(
        steps=30, tokenizer=name, segment_length=128, min_segments=3, max_segments=5, gap_share=1.0, gap_after=0.0, **ALONE, **more
    )
    batch = source[20]
    assert batch.gap is not None and int(batch.gap.filler.max()) < tokenizer.vocab_size
    assert "sun is" in tokenizer.decode(batch.gap.filler[0].tolist()) or "grass again" in tokenizer.decode(batch.tokens[0].tolist())
    assert source.digests.keys() == {"haystacks_sha256", "tokenizer_sha256"}
    again = pickle.loads(pickle.dumps(source))[20]
    assert torch.equal(again.tokens, batch.tokens)


class Register(torch.nn.Module):
    """Remembers every statement, in any tokens."""

    def __init__(self, name):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(vocab_size=390, segment_length=64, head_dim=8, tokenizer=name)
        self.tokenizer = open_tokenizer(name)

    def forward(self, tokens, state=None, *, keep="all"):
        rows = [old + new for old, new in zip(state or [[]] * len(tokens), tokens.tolist(), strict=True)]
        logits = torch.zeros(*tokens.shape, 390)
        for i, row in enumerate(rows):
            for j in range(tokens.shape[1] if keep == "all" else 0):
                text = self.tokenizer.decode(row[: len(row) - tokens.shape[1] + j + 1])
                asked, known = re.search(r"\nKey of (..) is (\d{0,4})\Z", text), dict(re.findall(r"\nKey of (..) is (\d{5})", text))
                if asked and asked[1] in known:
                    [digit] = self.tokenizer.encode(known[asked[1]][len(asked[2])])
                    logits[i, j, digit] = 1.0
        return logits if keep == "all" else None, rows


def test_capacity_is_measured_in_the_models_own_tokens(name, monkeypatch):
    monkeypatch.setattr("infini.tasks.recall.capacity.fingerprint", lambda model: "0")
    grid = CapacityGrid(pairs=(1, 5), distances=(0, 90), rows=2, asked=4, haystack="repeat", seed=0, piece=61, key_dim=None)
    rows, data = run(Register(name), grid)
    assert [row["exact_match"] for row in rows] == [1.0] * 4 and [row["names"] for row in rows] == [2, 2, 8, 8]
    assert data["tokenizer_sha256"] == open_tokenizer(name).fingerprint
    with pytest.raises(InputError, match=r"pairs are \[676\]; give at least one, each 1 to 6\d\d, the number of names"):
        run(Register(name), CapacityGrid(**{**vars(grid), "pairs": (676,)}))


def test_digits_that_are_joined_cannot_be_recalled_one_by_one(tmp_path):
    class Joined:
        def encode_bytes(self, data):
            return np.array([hash(piece) % 1000 for piece in re.findall(rb"\d+|\D", data)], np.int16)

    with pytest.raises(InputError, match="the tokenizer joins digits"):
        Statements(Joined())
