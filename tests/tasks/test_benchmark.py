import json
import time

import pytest
import torch
from infini.tasks.passkey import benchmark
from infini.tasks.passkey.benchmark import PasskeyBenchmark, run
from infini.tasks.passkey.cells import FinishedCells
from infini.tasks.passkey.keys import is_held_out
from infini.tasks.passkey.score import first_integer, right_digits

from infini import InfiniConfig, InfiniTransformer
from infini.errors import InputError

SMALL = dict(lengths=(300, 500), depths=(0.0, 0.5, 1.0), samples=3, piece=100)


def cells(folder):
    return {path.name: json.loads(path.read_text()) for path in (folder / "cells").iterdir()}


def test_a_model_that_knows_the_key_scores_one(oracle, tokenizer, tmp_path):
    rows = run(oracle(), tokenizer, PasskeyBenchmark(**SMALL), tmp_path)
    assert [(row["length"], row["depth"]) for row in rows] == [
        (n, depth) for n in (300, 500) for depth in (0.0, 0.5, 1.0)
    ]
    for row in rows:
        assert row["samples"] == 3
        assert row["exact_match"] == row["digit_accuracy"] == 1.0
        assert row["exact_match_low"] < 0.5 and row["exact_match_high"] == 1.0
        assert row["tokens_per_second"] > 0 and row["seconds"] > 0
        assert row["peak_memory_bytes"] > 50 * 2**20  # this process, not nothing
        assert row["state_bytes"] == row["length"] + 10  # what the oracle keeps of one sample


def test_answers_are_written_freely_never_fed(oracle, tokenizer, tmp_path):
    # Wrong in the second digit, this oracle goes on with the digits of the wrong key; fed the right
    # ones it would not know how to go on.
    wrong = oracle(lambda key: key[0] + str((int(key[1]) + 1) % 10) + key[2:])
    for row in run(wrong, tokenizer, PasskeyBenchmark(**SMALL), tmp_path):
        assert row["exact_match"] == 0.0
        assert row["digit_accuracy_by_position"] == [1.0, 0.0, 1.0, 1.0, 1.0]
        assert row["digit_accuracy"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("spoil", "digits"),
    [
        (lambda key: key + "7", [1, 1, 1, 1, 1]),  # the number does not end where the key ends
        (lambda key: key[:4], [1, 1, 1, 1, 0]),
        (lambda key: "nothing", [0, 0, 0, 0, 0]),
        (lambda key: "1, no, " + key, None),  # only the first integer counts
    ],
)
def test_only_the_whole_number_counts(oracle, tokenizer, tmp_path, spoil, digits):
    settings = PasskeyBenchmark(lengths=(300,), depths=(0.5,), samples=2)
    (row,) = run(oracle(spoil), tokenizer, settings, tmp_path)
    assert row["exact_match"] == 0.0
    if digits is not None:
        assert row["digit_accuracy_by_position"] == digits


def test_keys_are_held_out_and_differ_between_samples_cells_and_seeds(oracle, tokenizer, tmp_path):
    keys = []
    for seed in (0, 1):
        settings = PasskeyBenchmark(lengths=(300, 500), depths=(0.0, 1.0), samples=4, seed=seed)
        run(oracle(), tokenizer, settings, tmp_path / str(seed))
        keys += [s["key"] for cell in cells(tmp_path / str(seed)).values() for s in cell["samples"]]
    assert len(set(keys)) == 32
    assert all(map(is_held_out, keys))


def test_a_cell_does_not_depend_on_the_other_cells(oracle, tokenizer, tmp_path):
    many = PasskeyBenchmark(lengths=(300, 500), depths=(0.0, 1.0), samples=2)
    one = PasskeyBenchmark(lengths=(500,), depths=(1.0,), samples=2)
    run(oracle(), tokenizer, many, tmp_path / "many")
    run(oracle(), tokenizer, one, tmp_path / "one")
    alone = cells(tmp_path / "one")["500-1.json"]["samples"]
    assert cells(tmp_path / "many")["500-1.json"]["samples"] == alone


def test_needles_that_a_border_cuts_are_counted_apart(oracle, tokenizer, tmp_path):
    # The needle of 58 bytes begins at 150 when depth is 0.
    for segment_length, cut in ((64, True), (149, False), (150, False), (151, True)):
        model = oracle(lambda key: "0" * 5, segment_length)
        settings = PasskeyBenchmark(lengths=(300,), depths=(0.0,), samples=2)
        (row,) = run(model, tokenizer, settings, tmp_path / str(segment_length))
        assert row["border_cut"] == (2 if cut else 0)
        assert row["border_cut_exact_match"] == (0.0 if cut else None)


def test_depths_can_differ_between_lengths(oracle, tokenizer, tmp_path):
    settings = PasskeyBenchmark(lengths=(300, 500), depths={300: (0.0, 1.0), 500: (0.5,)})
    rows = run(oracle(), tokenizer, settings, tmp_path)
    assert [(row["length"], row["depth"]) for row in rows] == [(300, 0.0), (300, 1.0), (500, 0.5)]


def test_the_clock_runs_while_prompts_are_read_and_not_besides(oracle, tokenizer, tmp_path, monkeypatch):
    model, slow = oracle(), 0.3
    forward, build = model.forward, benchmark.build_prompt

    def waits(tokens, *args, **kwargs):
        time.sleep(slow if model.calls < 2 else slow / 10)
        return forward(tokens, *args, **kwargs)

    def builds(*given):
        time.sleep(slow)
        return build(*given)

    model.forward = waits
    monkeypatch.setattr(benchmark, "build_prompt", builds)
    settings = PasskeyBenchmark(lengths=(500,), depths=(0.5,), samples=2, batch_size=2, piece=100)
    (row,) = run(model, tokenizer, settings, tmp_path)
    assert 5 * slow / 10 <= row["seconds"] < slow  # five pieces, without the first calls of all, prompts, and ten calls to write
    assert row["tokens_per_second"] == pytest.approx(1000 / row["seconds"])


class StoppedByUser(KeyboardInterrupt):
    pass


def test_depths_that_are_nearly_equal_have_cells_of_their_own(tmp_path):
    cells = FinishedCells(tmp_path, {})
    cells.put(4096, 0.3333333, {"row": 1})
    assert cells.get(4096, 0.33333331) is None and cells.get(4096, 0.3333333) == {"row": 1}


def test_an_interrupted_run_keeps_its_cells_and_does_only_the_rest(oracle, tokenizer, tmp_path):
    settings = PasskeyBenchmark(**SMALL)
    model = oracle()
    forward, warm_up, calls_per_cell = model.forward, 2, 3 * (3 + 10)  # 300 tokens in pieces of 100, 10 written

    def stops(*args, **kwargs):
        if model.calls == warm_up + calls_per_cell + 5:
            raise StoppedByUser
        return forward(*args, **kwargs)

    model.forward = stops
    with pytest.raises(StoppedByUser):
        run(model, tokenizer, settings, tmp_path)
    first = cells(tmp_path)
    assert list(first) == ["300-0.json"]

    model.forward, model.calls = forward, 0
    rows = run(model, tokenizer, settings, tmp_path)
    assert len(rows) == 6
    assert model.calls == warm_up + 2 * calls_per_cell + 3 * 3 * (5 + 10)  # not the first cell
    assert rows[0] == first["300-0.json"]["row"]

    model.calls = 0
    assert run(model, tokenizer, settings, tmp_path) == rows
    assert model.calls == 0


@pytest.mark.parametrize(
    "change",
    [dict(samples=2), dict(seed=1), dict(lengths=(300,)), dict(digits=6), "weights", "text"],
)
def test_the_folder_of_another_run_is_refused(oracle, tokenizer, tmp_path, change):
    model, text = oracle(), tmp_path / "own.txt"
    text.write_text("One. Two. ")
    mine = SMALL | dict(haystack=f"text:{text}")
    run(model, tokenizer, PasskeyBenchmark(**mine), tmp_path / "out")
    before = cells(tmp_path / "out")
    if change == "weights":
        model.weight.data += 1
    elif change == "text":
        text.write_text("One. Three. ")
    else:
        mine |= change
    with pytest.raises(InputError, match="output folder .* holds another run: its .*choose another"):
        run(model, tokenizer, PasskeyBenchmark(**mine), tmp_path / "out")
    assert cells(tmp_path / "out") == before


def test_results_of_an_unknown_run_are_refused(oracle, tokenizer, tmp_path):
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(InputError, match="no run.json"):
        run(oracle(), tokenizer, PasskeyBenchmark(**SMALL), tmp_path)


def test_a_length_that_is_too_short_is_found_before_any_work(oracle, tokenizer, tmp_path):
    model = oracle()
    with pytest.raises(InputError, match="length is 100 tokens.*at least 247"):
        run(model, tokenizer, PasskeyBenchmark(lengths=(300, 100)), tmp_path / "out")
    assert model.calls == 0 and not (tmp_path / "out").exists()


def test_weights_that_are_not_numbers_are_reported_not_scored(oracle, tokenizer, tmp_path):
    model = oracle()
    model.weight.data[:] = float("nan")
    with pytest.raises(InputError, match="not finite after 300 tokens"):
        run(model, tokenizer, PasskeyBenchmark(**SMALL), tmp_path)
    assert not (tmp_path / "cells").exists()


def test_a_tokenizer_that_is_not_the_models_is_refused(oracle, tokenizer, tmp_path):
    model = oracle()
    model.config.vocab_size = 255
    with pytest.raises(InputError, match="tokenizer has 256 tokens, the model 255"):
        run(model, tokenizer, PasskeyBenchmark(**SMALL), tmp_path)


def test_batch_and_piece_do_not_change_the_answers_of_a_real_model(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = InfiniConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, segment_length=64
    )
    model = InfiniTransformer(config).eval()
    found = []
    for batch_size, piece in ((1, 4096), (3, 50), (2, 64)):
        settings = PasskeyBenchmark(**SMALL | dict(batch_size=batch_size, piece=piece))
        output = tmp_path / f"{batch_size}-{piece}"
        rows = run(model, tokenizer, settings, output)
        assert {row["state_bytes"] for row in rows} == {model.state_bytes(300)}
        found.append({name: cell["samples"] for name, cell in cells(output).items()})
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(lengths=()), "lengths is empty"),
        (dict(lengths=(0,)), "length is 0"),
        (dict(depths=(1.5,)), "depth is 1.5.*from 0 to 1"),
        (dict(depths=()), "has no depth"),
        (dict(depths={4096: (0.5,)}), "depths are given for lengths .*name the same lengths"),
        (dict(samples=0), "samples is 0"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(piece=0), "piece is 0"),
        (dict(digits=2), "digits is 2.*3 to 18"),
        (dict(seed=-1), "seed is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        PasskeyBenchmark(**settings)


def test_scoring_reads_the_first_integer():
    assert first_integer(" 12345.\nWhat") == "12345"
    assert first_integer("is 1 2") == "1"
    assert first_integer("none") == ""
    assert right_digits("123456", 12345) == [True] * 5
    assert right_digits("", 123) == [False] * 3


def test_needles_that_are_cut_are_judged_among_themselves():
    samples = [{"exact": i == 0, "digits": [True], "border_cut": i < 2} for i in range(8)]
    found = benchmark._summary(samples)
    assert (found["exact_match"], found["border_cut"], found["border_cut_exact_match"]) == (1 / 8, 2, 1 / 2)


def test_every_prompt_begins_elsewhere_in_the_filler(tokenizer):
    settings = PasskeyBenchmark(lengths=(300,), depths=(0.5,), samples=8)
    haystack = benchmark.Haystack.load("repeat", tokenizer)
    phases = {question.phase for question in benchmark.draw_questions(settings, haystack, 300, 0.5)}
    assert len(phases) > 4 and max(phases) > len(haystack.ids) / 2


def test_digits_are_those_of_the_number_and_not_of_the_words_before(oracle, tokenizer, tmp_path):
    settings = PasskeyBenchmark(lengths=(300,), depths=(0.5,), samples=2)
    (row,) = run(oracle(lambda key: "no " + key), tokenizer, settings, tmp_path)
    assert row["exact_match"] == row["digit_accuracy"] == 1.0
