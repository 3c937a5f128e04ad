import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from infini.tasks.passkey.keys import is_held_out
from infini.tasks.recall.capacity import CapacityGrid, capacity, run, theory

from infini import InfiniConfig, InfiniTransformer
from infini.cli.build import build, locate
from infini.cli.compose import compose
from infini.errors import InputError


class Register(torch.nn.Module):
    """Remembers the last ``size`` names within ``reach`` bytes, and answers 0 for the others."""

    def __init__(self, size=10**6, reach=10**9):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(vocab_size=256, segment_length=64)
        self.size, self.reach, self.read = size, reach, []

    def forward(self, tokens, state=None, *, keep="all"):
        rows = [old + bytes(new).decode("latin-1") for old, new in zip(state or [""] * len(tokens), tokens.tolist())]
        if keep == "none":
            return None, rows
        self.read = rows
        logits = torch.zeros(*tokens.shape, 256)
        for i, row in enumerate(rows):
            for j in range(tokens.shape[1]):
                text = row[: len(row) - tokens.shape[1] + j + 1]
                logits[i, j, ord(self.next(text))] = 1.0
        return logits, rows

    def next(self, text):
        asked = re.search(r"\nKey of (..) is (\d*)\Z", text)
        said = list(re.finditer(r"\nKey of (..) is (\d{5})\.", text))
        known = {f[1]: f[2] for f in said[-self.size :] if len(text) - f.start() <= self.reach}
        return known.get(asked[1], "00000")[len(asked[2])] if asked and len(asked[2]) < 5 else "?"


def test_a_model_that_remembers_all_scores_one_and_one_that_forgets_does_not():
    rows = capacity(Register(), 64, (1, 4, 20), (0, 300), rows=2, asked=6, piece=97)
    assert [(row["pairs"], row["distance"]) for row in rows] == [(n, d) for n in (1, 4, 20) for d in (0, 300)]
    assert all(row["digit_accuracy"] == row["exact_match"] == 1.0 for row in rows)
    assert [row["names"] for row in rows] == [2, 2, 8, 8, 12, 12]
    assert [row["associations"] for row in rows][::2] == [5, 20, 100]

    near, far = capacity(Register(reach=310), 64, (4,), (0, 300), rows=2)
    assert near["exact_match"] == 1.0 and far["exact_match"] == 0.0 and far["digit_accuracy"] < 0.3


def test_accuracy_falls_where_there_are_more_pairs_than_room():
    few, many = capacity(Register(size=20), 64, (8, 64), (100,), rows=6, asked=8)
    assert few["exact_match"] == 1.0
    # Of 64 names the last 20 are known, less those that the questions have pushed out.
    assert 0.08 < many["exact_match"] < 0.5


def test_the_text_states_each_name_once_then_asks_some_of_them(tmp_path):
    (tmp_path / "own.txt").write_text("abcdefghij klmnop. " * 7)
    model = Register()
    capacity(model, 64, (12,), (333,), rows=3, asked=5, haystack=f"text:{tmp_path}/own.txt")
    for text in model.read:
        said = re.findall(r"\nKey of (..) is (\d{5})\.", text)
        assert len(said) == 17 and len(dict(said)) == 12 and len({name for name, _ in said[:12]}) == 12
        assert set(said[12:]) <= set(said[:12]) and len(set(said[12:])) == 5
        assert is_held_out(np.array([int(key) for _, key in said])).all()
        filler = re.sub(r"\nKey of .. is \d{5}\.", "", text)
        assert len(filler) == 333 and filler in "abcdefghij klmnop. " * 30
    assert len(set(model.read)) == 3


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_theory_holds_about_d_k_pairs(rule):
    accuracy = [theory(n, 64, rule) for n in (2, 8, 64, 512, 4096)]
    assert accuracy == sorted(accuracy, reverse=True)
    assert accuracy[0] > 0.99 and accuracy[1] > 0.95 and accuracy[3] < 0.5 and accuracy[4] < 0.2
    # What counts is pairs per dimension.
    assert theory(256, 256, rule) == pytest.approx(theory(64, 64, rule), abs=0.04)
    assert theory(64, 256, rule) > theory(64, 64, rule) + 0.05


def test_by_the_delta_rule_later_pairs_push_out_earlier_ones():
    # The linear rule keeps a little of everything, which is enough to tell ten values apart.
    assert theory(32, 64, "delta") > 0.95 and theory(32, 64, "linear") > 0.95
    assert theory(256, 64, "delta") < theory(256, 64, "linear") - 0.15


def test_linear_theory_is_the_crosstalk_of_random_keys():
    # Signal 1 against noise of variance (pairs - 1) / d_k / values on each of the values: with two
    # values the difference has variance (pairs - 1) / d_k, so accuracy is Phi(sqrt(d_k / (pairs - 1))).
    for pairs, key_dim in ((100, 64), (400, 100)):
        expected = 0.5 * (1 + torch.erf(torch.tensor(((key_dim / (pairs - 1)) / 2) ** 0.5)).item())
        assert theory(pairs, key_dim, "linear", values=2, trials=400) == pytest.approx(expected, abs=0.01)


def test_a_real_model_gives_the_same_in_any_pieces():
    torch.manual_seed(0)
    config = InfiniConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, segment_length=32
    )
    model = InfiniTransformer(config).eval()
    whole, parts = (capacity(model, 16, (3,), (100,), rows=2, piece=n) for n in (10_000, 41))
    assert whole == parts


@pytest.mark.parametrize("name", ["infini_long", "transformer_xl", "memorizing", "full", "sliding", "rmt", "gated_deltanet"])
def test_every_model_is_measured_the_same_in_any_pieces(name, tmp_path):
    config = compose("train", ["debug=tiny", f"model={name}", "model.segment_length=32", "task.min_segments=9", "task.max_segments=9"])
    torch.manual_seed(0)
    kind = locate(config["model"]["_model_"])
    kind(build("model", config["model"])).save_pretrained(tmp_path)
    model = kind.from_pretrained(tmp_path)
    grid = dict(pairs=(6,), distances=(150,), rows=3, asked=6, haystack="repeat", seed=0, key_dim=None)
    (whole, data), (parts, _) = (run(model, CapacityGrid(**grid, piece=piece)) for piece in (10_000, 41))
    assert whole == parts and whole[0]["key_dim"] == 16 and whole[0]["names"] == 18 and len(data["checkpoint_sha256"]) == 64
    # An untrained model guesses: what it is asked for is nowhere in what it has just read.
    assert whole[0]["digit_accuracy"] < 0.3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(pairs=(0,)), "pairs are"),
        (dict(pairs=(677,)), "pairs are"),
        (dict(distances=()), "distances are"),
        (dict(distances=(-1,)), "distances are"),
        (dict(rows=0), "rows is 0"),
        (dict(key_dim=0), "key_dim is 0"),
        (dict(haystack="essays"), "haystack is 'essays'"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(setting, message):
    with pytest.raises(InputError, match=message):
        capacity(Register(), **dict(key_dim=8) | setting)
    with pytest.raises(InputError, match="rule is"):
        theory(2, 2, "hebb")


def test_theory_is_asked_about_digits_and_cells_draw_their_own_keys():
    models = Register(), Register()
    rows = [capacity(model, 16, (8,), (distance,), rows=1)[0] for model, distance in zip(models, (0, 50))]
    assert all(row["theory_delta"] == theory(40, 16, "delta") and row["theory_linear"] == theory(40, 16, "linear") for row in rows)
    one, other = (set(re.findall(r"is (\d{5})", model.read[0])) for model in models)
    assert len(one & other) < 4
