"""A sweep's tables, number by number, from records written by hand."""

import json
import math

import pytest

from infini.cli.report import run as report
from infini.errors import InputError
from infini.report.intervals import wilson_interval
from infini.report.jobs import note_job, plan_jobs
from infini.report.pooled import capacity_cells, compare, passkey_cells, speed_cells
from infini.report.record import write_record
from infini.report.sweep import Run, Setting, Sweep, gather, validation
from infini.report.sweep_overview import overview_table
from infini.report.sweep_plots import _panels, sweep_curves
from infini.report.sweep_tables import perplexity_table, problems_list, rates_table, speed_table, sweep_tables

PROVENANCE = {
    "schema": 1,
    "source": {"commit": "0123456789abcdef", "dirty": False, "diff_sha256": None},
    "data": {},
    "seeds": {},
    "machine": {"cpu": "Some CPU", "cores": 2, "gpus": []},
    "versions": {"torch": "2.13.0"},
    "started": "2026-01-01T00:00:00+00:00",
    "seconds": 1,
}


CARRIED = {"carried_numbers": 1_585_152, "carried_bytes": 3 * 2**20, "state_bytes": 2**21 * 5}


def train(folder, *overrides, loss, **metrics):
    """A finished job, its training record and the note."""
    found = {"steps": 10, "tokens": 1000, "parameters": 77, "token_loss": math.log(2) * loss, "answer_loss": None, "loss": loss}
    found |= {"tokens_per_second": 500.0, "gradient_tokens": 24576, "text_tokens": 1048576} | metrics
    config = {"model": {"tokenizer": "bytes"}}
    record = PROVENANCE | {"kind": "train", "command": "infini train", "config": config, "overrides": list(overrides), "metrics": found}
    write_record(record, folder / "record.json")
    note_job(folder, overrides)


def passkey(folder, *rows):
    """Rows of length, depth, samples, right, digit_accuracy."""
    rows = [
        {"length": n, "depth": d, "samples": s, "exact_match": right / s, "digit_accuracy": digits, "tokens_per_second": 1, "peak_memory_bytes": 1}
        for n, d, s, right, digits in rows
    ]
    write_record(PROVENANCE | {"kind": "passkey", "command": "infini passkey", "config": {}, "rows": rows}, folder / "record.json")


def perplexity(folder, **documents):
    """Documents by name: nll, bytes."""
    rows = [
        {"document": name, "tokens": 10, "words": 4, "bytes": size, "nll": nll, "nll_without_memory": None, **CARRIED, "by_position": []}
        for name, (nll, size) in documents.items()
    ]
    write_record(PROVENANCE | {"kind": "perplexity", "command": "infini perplexity", "config": {}, "rows": rows}, folder / "record.json")


def lines(text):
    """The lines of all tables, as lists of cells."""
    return [[cell.strip() for cell in line.strip("|\n ").split(" | ")] for line in text.splitlines() if line.startswith("| ")]


def line(text, *begin):
    (found,) = [cells for cells in lines(text) if cells[: len(begin)] == list(begin)]
    return found


@pytest.fixture
def sweep(tmp_path):
    """Two models, two rates, two seeds: one rate diverged for one of them, one job was never begun."""
    jobs = [(f"model={m}", f"seed={s}", f"train.learning_rate={r}") for m in ("rmt", "full") for r in ("1e-3", "2e-3") for s in (0, 1)]
    plan_jobs(tmp_path, jobs)
    losses = {("rmt", "1e-3"): (2.0, 4.0), ("rmt", "2e-3"): (1.0, None), ("full", "1e-3"): (5.0, None), ("full", "2e-3"): (3.0, 3.5)}
    for (model, rate), pair in losses.items():
        for seed, loss in enumerate(pair):
            folder, overrides = tmp_path / f"{model}{rate}{seed}", (f"model={model}", f"seed={seed}", f"train.learning_rate={rate}")
            if loss is not None:
                train(folder, *overrides, loss=loss)
            elif model == "rmt":
                note_job(folder, overrides, "the loss became nan in step 7")
    passkey(tmp_path / "rmt1e-30" / "passkey", (4096, 0.0, 4, 4, 1.0), (4096, 1.0, 4, 3, 0.9), (8192, 0.5, 4, 1, 0.5))
    passkey(tmp_path / "rmt1e-31" / "passkey", (4096, 0.0, 4, 2, 0.6), (4096, 1.0, 4, 1, 0.3))
    passkey(tmp_path / "rmt2e-30" / "passkey", (4096, 0.0, 4, 0, 0.0))
    return tmp_path


def test_seeds_are_pooled_at_the_rate_with_most_seeds_and_then_the_lowest_loss(sweep):
    found = gather(sweep)
    assert found.keys == ("model",)
    assert [(setting.values, setting.rate) for setting in found.best()] == [(("rmt",), "1e-3"), (("full",), "2e-3")]  # as planned
    text = sweep_tables(found)
    # rmt: losses 2 and 4, mean 3, s = sqrt(2), half = 12.706 * sqrt(2) / sqrt(2).
    row = line(text, "rmt", "1e-3")
    assert row[2:7] == ["2 of 2", "10", "1,000", "77", "3 ± 13"]
    assert row[7:] == ["3 ± 13", "500 ± 0", "24,576", "1,048,576"]  # token loss of ln 2 each: as many bits
    assert "bits/byte" in text and "answer loss" not in text  # no run has answers: no column of dashes
    assert line(text, "full", "2e-3")[2:7] == ["2 of 2", "10", "1,000", "77", "3.25 ± 3.2"]


def test_what_failed_or_is_missing_stays(sweep):
    assert problems_list(gather(sweep)).splitlines()[2:] == [
        "- rmt, learning rate 2e-3, seed 1: the loss became nan in step 7",
        "- full, learning rate 1e-3, seed 1: not begun",
    ]
    found = gather(sweep)
    assert line(rates_table(found), "rmt") == ["rmt", "**3 (2 of 2)**", "1 (1 of 2)", "yes"]
    assert line(rates_table(found), "full") == ["full", "5 (1 of 2)", "**3.25 (2 of 2)**", "yes"]


def test_a_row_of_which_nothing_finished_stays_too(tmp_path):
    train(tmp_path / "a", "model=a", "seed=0", loss=1.0)
    note_job(tmp_path / "b", ["model=b", "seed=0"], "out of memory")
    note_job(tmp_path / "c", ["model=c", "seed=0"])
    passkey(tmp_path / "a" / "passkey", (4096, 0.0, 4, 4, 1.0))
    text = sweep_tables(gather(tmp_path))
    training, overview, asked = [cells for cells in lines(text) if cells[0] == "b"]
    assert training[1:6] == ["0 of 1", "-", "-", "-", "-"] and asked == ["b", "-", "0 of 1", *["-"] * 7]
    assert overview == ["b", "0 of 1", *["-"] * 4]
    assert "- b, seed 0: out of memory\n- c, seed 0: not finished\n" in text and "Learning rates" not in text


def test_passkey_is_pooled_over_depths_and_seeds(sweep):
    text = sweep_tables(gather(sweep))
    # 4096: 4 + 3 + 2 + 1 of 16; Wilson's interval of 10 of 16, and of 0.7 of 16 for digits; seeds 7/8 and 3/8; depths 6/8 and 4/8.
    assert line(text, "rmt", "4,096")[2:] == [
        "2 of 2", "16", "62.5 %", "38.6 % to 81.5 %", "70.0 %", "45.6 % to 86.7 %", "37.5 %", "50.0 % at 1",
    ]  # fmt: skip
    assert line(text, "rmt", "8,192")[2:6] == ["1 of 2", "4", "25.0 %", "4.6 % to 69.9 %"]
    assert line(text, "full", "-")[2] == "0 of 2"


def test_the_evaluation_that_picks_is_no_test(sweep):
    for name, right in (("rmt1e-30", 1), ("rmt1e-31", 0), ("rmt2e-30", 4), ("full2e-30", 4), ("full1e-30", 2)):
        passkey(sweep / name / "validation", (1024, 0.5, 4, right, right / 4), (2048, 0.5, 12, 12, 1.0))
    found = gather(sweep, pick="validation/exact_match")
    assert [setting.rate for setting in found.best()] == ["1e-3", "2e-3"]  # two seeds before one, however good that one
    text = sweep_tables(found)
    assert line(rates_table(found), "rmt") == ["rmt", "**0.7812 (2 of 2)**", "1 (1 of 2)", "yes"]  # (13/16 + 12/16) / 2
    assert "the highest mean `validation/exact_match`" in text
    assert "## passkey" in text and "## validation" not in text and "1,024" not in text
    assert "## validation" in sweep_tables(gather(sweep))


def test_among_rates_with_all_seeds_the_direction_of_the_number_decides(tmp_path):
    for rate, loss in (("1e-3", 2.0), ("2e-3", 1.0), ("4e-3", 3.0)):
        train(tmp_path / rate, f"train.learning_rate={rate}", "seed=0", loss=loss, answer_accuracy=loss / 4)
    assert gather(tmp_path).best()[0].rate == "2e-3"
    assert line(rates_table(gather(tmp_path)), "2 (1 of 1)") == ["2 (1 of 1)", "**1 (1 of 1)**", "3 (1 of 1)", "no"]
    best = gather(tmp_path, pick="answer_accuracy")
    assert best.best()[0].rate == "4e-3" and "75" in line(sweep_tables(best), "4e-3")
    with pytest.raises(InputError, match="pick is 'nothing', which no run has"):
        gather(tmp_path, pick="nothing")


def test_perplexities_are_compared_document_by_document(tmp_path):
    bit = math.log(2)
    for seed, more in ((0, 1), (1, 3)):  # averaged over seeds: 2 bits more for each document
        train(tmp_path / f"a{seed}", "model=a", f"seed={seed}", loss=1.0)
        train(tmp_path / f"b{seed}", "model=b", f"seed={seed}", loss=1.0)
        perplexity(tmp_path / f"a{seed}" / "books", x=(80 * bit, 40), y=(10 * bit, 10))
        perplexity(tmp_path / f"b{seed}" / "books", y=((10 + more) * bit, 10), x=((80 + 4 * more) * bit, 40))
    text = sweep_tables(gather(tmp_path))
    # a: 90 bits of 50 bytes. b: x 8 more of 40, y 2 more of 10: 0.2 bits a byte, in every draw of documents.
    assert line(text, "a", "2 of 2", "2")[2:] == ["2", "22.63 ± 0", "2435 ± 0", "1.8 ± 0", "1,585,152", "3.00", "10.00", "-", "-"]
    assert line(text, "b", "2 of 2", "2")[-2:] == ["+0.2000", "+0.2000 to +0.2000"]
    assert line(sweep_tables(gather(tmp_path), against="b"), "a", "2 of 2", "2")[-2:] == ["-0.2000", "-0.2000 to -0.2000"]
    with pytest.raises(InputError, match="against is 'c', but the rows are a, b"):
        sweep_tables(gather(tmp_path), against="c")

    twice = [{"rows": [{"document": "x", "nll": nll * bit, "bytes": size} for nll, size in ((1.0, 2), (6.0, 4))]}]
    once_more = [{"rows": [{"document": "x", "nll": nll * bit, "bytes": size} for nll, size in ((0.0, 2), (4.0, 4))]}]
    assert compare(twice, once_more)[0] == pytest.approx(3 / 6)  # two documents of one name

    records = [{"rows": [{"document": "x", "nll": 1.0, "bytes": 3}]}]
    with pytest.raises(InputError, match="document 'y' was read by one of two"):
        compare(records, [{"rows": [{"document": "x", "nll": 1.0, "bytes": 3}, {"document": "y", "nll": 1.0, "bytes": 3}]}])
    with pytest.raises(InputError, match="document 'x' has two sizes"):
        compare(records, [{"rows": [{"document": "x", "nll": 1.0, "bytes": 4}]}])


def test_capacity_is_pooled_over_seeds(tmp_path):
    for seed, digits in ((0, 1.0), (1, 0.5)):
        train(tmp_path / str(seed), "model=a", f"seed={seed}", loss=1.0)
        rows = [{"model": "a", "key_dim": 8, "distance": 1024, "pairs": 4, "names": 8, "digit_accuracy": digits, "exact_match": digits / 2}]
        record = PROVENANCE | {"kind": "capacity", "command": "infini capacity", "config": {}, "rows": rows}
        write_record(record, tmp_path / str(seed) / "capacity" / "record.json")
    # 12 of 16.
    assert line(sweep_tables(gather(tmp_path)), "1,024") == ["1,024", "4", "2 of 2", "16", "75.0 %", "50.5 % to 89.8 %", "37.5 %"]


def test_the_overview_tells_every_row_with_all_that_is_known_of_it(sweep):
    for name, right in (("rmt1e-30", 4), ("rmt1e-31", 2), ("full2e-30", 1), ("full2e-31", 0)):
        passkey(sweep / name / "validation", (1024, 0.5, 4, right, right / 4))
    note_job(sweep / "gone", ("model=gone", "seed=0", "train.learning_rate=1e-3"), "out of memory")
    text = overview_table(gather(sweep, pick="validation/exact_match"), "passkey")
    head, _, *rows = lines(text)
    assert head[1:5] == ["seeds", "learning rate", "`validation/exact_match` at 1e-3", "`validation/exact_match` at 2e-3"]
    assert [row[0] for row in rows] == ["rmt", "full", "gone"]
    # Exact match at 4,096: seed 0 has 7 of 8, seed 1 has 3 of 8; digits 0.95 and 0.45. At 8,192 only seed 0 was asked.
    assert rows[0][1:5] == ["2 of 2", "1e-3", "**75.0 %**", "not measured"]  # one rate's only finished seed has no record to pick by
    assert rows[0][5:] == [
        "62.5 % (37.5 to 87.5)", "70.0 % (45.0 to 95.0)", "25.0 %, 1 of 2 seeds", "50.0 %, 1 of 2 seeds", "24,576", "1,048,576",
    ]  # fmt: skip
    assert rows[1][1:] == ["0 of 2", "2e-3", "not measured", "**12.5 %**", "-", "-", "-", "-", "24,576", "1,048,576"]
    assert rows[2][1:5] == ["0 of 1", "1e-3", "failed", "-"]


def test_the_overview_says_of_how_many_seeds_a_rate_is_picked(sweep):
    passkey(sweep / "rmt1e-30" / "validation", (1024, 0.5, 4, 3, 0.75))
    passkey(sweep / "rmt2e-30" / "validation", (1024, 0.5, 4, 4, 1.0))
    text = overview_table(gather(sweep, pick="validation/digit_accuracy"), "passkey")
    assert line(text, "rmt")[3:5] == ["**75.0 % (1 of 2)**", "100.0 % (1 of 2)"]
    assert line(overview_table(gather(sweep), "passkey"), "full")[3:5] == ["5 (1 of 2)", "**3.25**"]  # a loss is no share


def test_a_rate_is_picked_by_the_seeds_that_were_measured(tmp_path):
    """One seed of two with every digit right is less than two seeds with nine of ten."""
    for rate, shares in (("1e-3", (1.0, None)), ("2e-3", (0.9, 0.9))):
        for seed, share in enumerate(shares):
            run = tmp_path / f"{rate}-{seed}"
            train(run, "model=a", f"train.learning_rate={rate}", f"seed={seed}", loss=1.0)
            if share is not None:
                passkey(run / "validation", (1024, 0.5, 10, 10 * share, share))
    found = gather(tmp_path, pick="validation/digit_accuracy")
    assert [best.rate for best in found.best()] == ["2e-3"]
    assert line(rates_table(found), "1 (1 of 2)")[1] == "**0.9 (2 of 2)**"


def test_of_equal_rates_the_middle_one_is_picked(tmp_path):
    for rate, loss in (("5e-4", 1.0), ("1e-3", 1.0), ("2e-3", 1.0), ("4e-3", 0.5)):
        train(tmp_path / rate, "model=a", f"train.learning_rate={rate}", loss=loss)
    assert gather(tmp_path).best()[0].rate == "4e-3"
    train(tmp_path / "4e-3", "model=a", "train.learning_rate=4e-3", loss=2.0)
    assert gather(tmp_path).best()[0].rate == "1e-3"


def test_report_writes_the_same_bytes_again_and_remembers_how(sweep, capsys):
    for path in sweep.rglob("passkey"):
        passkey(path.parent / "validation", (1024, 0.5, 4, 1, 0.25))
    report([str(sweep), "pick=validation/digit_accuracy", "against=full"])
    assert capsys.readouterr().out.splitlines()[-2:] == [str(sweep / "sweep.md"), str(sweep / "sweep.png")]
    before = [(sweep / name).read_bytes() for name in ("sweep.md", "sweep.png")]
    assert json.loads((sweep / "sweep.json").read_text())["report"] == {"pick": "validation/digit_accuracy", "against": "full"}
    plan_jobs(sweep, [["model=rmt", "seed=0", "train.learning_rate=1e-3"]])  # the same command once more forgets nothing
    report([str(sweep)])
    assert [(sweep / name).read_bytes() for name in ("sweep.md", "sweep.png")] == before
    assert before[1].startswith(b"\x89PNG") and b"validation/digit_accuracy" in before[0]


def test_runs_that_were_trained_one_by_one_are_gathered_where_asked(tmp_path, capsys):
    for model, loss in (("a", 1.0), ("b", 2.0)):
        train(tmp_path / model, f"model={model}", loss=loss)
    report([str(tmp_path)])
    assert not (tmp_path / "sweep.md").exists()
    report([str(tmp_path), "gather=true"])
    assert [cells[0] for cells in lines((tmp_path / "sweep.md").read_text())] == ["model", "---:", "a", "b"]
    with pytest.raises(InputError, match="gather is 'yes'; use true or false"):
        report([str(tmp_path), "gather=yes"])


def test_records_that_do_not_say_how_they_were_asked_for_are_told_by_their_command(tmp_path):
    for model in "ab":
        train(tmp_path / model, loss=1.0)
        record = json.loads((tmp_path / model / "record.json").read_text())
        del record["overrides"]
        write_record(record | {"command": f"infini train model={model} output=runs/{model}"}, tmp_path / model / "record.json")
    assert [setting.values for setting in gather(tmp_path).settings] == [("a",), ("b",)]


def test_no_runs(tmp_path):
    with pytest.raises(InputError, match="there are no training runs in"):
        gather(tmp_path)


def test_perplexity_is_drawn_by_position_and_as_a_difference(tmp_path):
    for seed, more in ((0, 0.1), (1, 0.3)):  # 0.2 nats a token worse, seeds taken together, from position 1,024 on
        for name, extra in (("a", 0.0), ("b", more)):
            train(tmp_path / f"{name}{seed}", f"model={name}", f"seed={seed}", loss=1.0)
            cells = [(1, 1, 9.0), (512, 512, 512 * 2.0), (1024, 1000, 1000 * (3.0 + extra))]
            buckets = [{"from": start, "tokens": tokens, "nll": nll, "nll_without_memory": None} for start, tokens, nll in cells]
            row = {"document": "x", "tokens": 10, "words": 4, "bytes": 9, "nll": 1.0, "nll_without_memory": None, **CARRIED}
            record = PROVENANCE | {"kind": "perplexity", "command": "infini perplexity", "config": {}, "rows": [row | {"by_position": buckets}]}
            write_record(record, tmp_path / f"{name}{seed}" / "books" / "record.json")
    levels, difference = _panels(gather(tmp_path), "books", None)
    assert [place for place, _ in levels.lines["a"]] == [768, 1536]  # one token of each document says nothing
    assert dict(levels.lines["b"])[768] == pytest.approx(math.exp(2.0))
    assert difference.title == "books: worse than a" and not difference.percent
    assert [value for _, value in difference.lines["b"]] == pytest.approx([0.0, 0.2])
    other = _panels(gather(tmp_path), "books", "b")[1]
    assert [value for _, value in other.lines["a"]] == pytest.approx([0.0, -0.2])
    assert sweep_curves(gather(tmp_path)).startswith(b"\x89PNG")


def seeds(kind, *rows, rate=""):
    """A setting with an evaluation "e" of this kind for each seed; None: it was not measured."""
    found = [{} if own is None else {"e": {"kind": kind, "rows": own}} for own in rows]
    return Setting(("a",), rate, tuple(Run({}, {"metrics": {}}, evaluations=own) for own in found))


def test_seeds_and_cells_count_by_how_much_was_asked_of_them():
    asked = [[{"length": 64, "depth": 0.5, "samples": n, "exact_match": right / n, "digit_accuracy": digits}] for n, right, digits in (
        (100, 29, 0.4), (10, 10, 0.95),  # 29 / 100 * 100 is less than 29 in floating point
    )]  # fmt: skip
    (cell,) = passkey_cells(seeds("passkey", *asked), "e")
    assert cell["exact_match"] == 39 / 110 and cell["digit_accuracy"] == pytest.approx(49.5 / 110)
    assert (cell["low"], cell["high"]) == wilson_interval(39, 110)

    def row(pairs, names, digits):
        return {"distance": 9, "pairs": pairs, "names": names, "digit_accuracy": digits, "exact_match": digits / 2}

    both = seeds("capacity", [row(4, 8, 1.0), row(8, 5, 0.2)], [row(4, 24, 0.5)])
    one, other = capacity_cells(both, "e")
    assert (one["seeds"], one["names"], one["digit_accuracy"], one["exact_match"]) == (2, 32, 20 / 32, 10 / 32)
    assert (other["seeds"], other["names"]) == (1, 5)
    # So it is where a rate is picked: 8 and 1 of 8 and 5 names.
    assert validation(both.runs[0], "e/digit_accuracy") == pytest.approx(9 / 13)


def test_speeds_are_medians_and_what_one_seed_has_no_room_for_has_none():
    def rows(*rates):
        return [{"what": "reading", "length": 16 * 2**i, "tokens_per_second": rate, "peak_memory_bytes": 1, "state_bytes": 1}
                for i, rate in enumerate(rates)]  # fmt: skip

    setting = seeds("speed", rows(1.0, 5.0), rows(2.0, None), rows(9.0, 7.0), None)
    assert [cell["tokens_per_second"] for cell in speed_cells(setting, "e")] == [2.0, None]
    assert line(speed_table(Sweep(("model",), (setting,)), "e"), "a") == ["a", "reading", "3 of 4", "2 (0.00)", "no room"]


def test_a_seed_that_finds_nothing_counts():
    def row(share):
        return [{"samples": 2, "exact_match": share}]

    one, other = seeds("passkey", row(0.0), row(0.5), rate="1e-3"), seeds("passkey", row(0.4), row(0.4), rate="2e-3")
    sweep = Sweep(("model",), (one, other), pick="e/exact_match")
    assert sweep.picked_by(one) == 0.25 and sweep.best() == [other]
    assert Setting((), "", tuple(Run({}, {"metrics": {"share": share}}) for share in (0.0, None, 0.5))).metric("share") == [0.0, 0.5]


def test_a_rate_is_picked_by_all_documents():
    rows = [{"tokens": 9, "words": 3, "bytes": size, "nll": bits * math.log(2), "nll_without_memory": None} for size, bits in ((10, 10), (30, 90))]
    assert validation(seeds("perplexity", rows).runs[0], "e/bits_per_byte") == pytest.approx(100 / 40)


@pytest.mark.parametrize("key", ["seed", "train.seed", "task.seed"])
def test_runs_that_differ_in_a_seed_are_one_row(key, tmp_path):
    for seed in range(2):
        train(tmp_path / str(seed), "model=a", f"{key}={seed}", loss=1.0)
    assert [(gather(tmp_path).keys, len(setting.runs)) for setting in gather(tmp_path).settings] == [((), 2)]


def test_tokens_that_are_no_bytes_have_no_bits_a_byte(tmp_path):
    for model in "ab":
        train(tmp_path / model, f"model={model}", loss=1.0)
    record = json.loads((tmp_path / "b" / "record.json").read_text())
    write_record(record | {"config": {"model": {"tokenizer": "tok"}}}, tmp_path / "b" / "record.json")
    text = sweep_tables(gather(tmp_path))
    place = lines(text)[0].index("bits/byte")
    assert [line(text, model, "1 of 1")[place] for model in "ab"] == ["1", "-"]


def test_the_edge_is_that_of_the_rates_of_its_own_row(tmp_path):
    for model, rates in (("a", {"1e-3": 2.0, "2e-3": 1.0, "4e-3": 2.0}), ("b", {"2e-3": 1.0, "4e-3": 2.0, "8e-3": 3.0})):
        for rate, loss in rates.items():
            train(tmp_path / f"{model}{rate}", f"model={model}", f"train.learning_rate={rate}", loss=loss)
    assert [line(rates_table(gather(tmp_path)), model)[-1] for model in "ab"] == ["no", "yes"]


def test_the_silenced_model_has_bits_a_byte_too():
    counts = {"document": "x", "tokens": 10, "words": 4, "bytes": 40, **CARRIED, "by_position": []}
    setting = seeds("perplexity", [counts | {"nll": 40 * math.log(2), "nll_without_memory": 80 * math.log(2)}])
    head, _, row = lines(perplexity_table(Sweep(("model",), (setting,)), "e"))
    assert (row[head.index("bits/byte")], row[head.index("bits/byte without memory")]) == ("1", "2")


def test_the_picture_has_the_intervals_of_the_table():
    setting = seeds("passkey", [{"length": 64, "depth": 0.5, "samples": 20, "exact_match": 0.5, "digit_accuracy": 1.0}])
    (panel,) = _panels(Sweep(("model",), (setting,)), "e", None)
    assert panel.lines == {"a": [pytest.approx([64, 50, *(100 * end for end in wilson_interval(10, 20))])]}
