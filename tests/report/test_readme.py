"""The README is true: its numbers are those of records, its Python runs."""

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest

from infini.cli.compose import compose

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def read(source: str) -> dict:
    return json.loads((ROOT / source).read_text())


def right_of(rows: list[dict]) -> str:
    """"398 of 400", cells taken together."""
    return f"{sum(round(row['exact_match'] * row['samples']) for row in rows)} of {sum(row['samples'] for row in rows)}"


FAR = "results/passkey_mixed_12m_far"


def of_seeds(names: list[str], length: int, folder: str = FAR) -> str:
    """"220, 219 of 220": both seeds in the records of these names, as far as they were asked; nothing where none was."""
    told = []
    for seed in (0, 1):
        sources = [f"{folder}/seed{seed}/{name}/record.json" for name in names]
        rows = [row for source in sources if (ROOT / source).exists() for row in read(source)["rows"] if row["length"] == length]
        told += [right_of(rows)] if rows else []
    return ", ".join([cell.split()[0] for cell in told[:-1]] + told[-1:])


def test_the_table_is_the_records():
    (table,) = re.findall(rf"<!-- two seeds: {FAR} -->\n((?:\|.*\n)+)", README)
    names = re.findall(r"\(`(\w+)`\)", table.splitlines()[0])
    assert len(names) == 2 and len(table.splitlines()) == 10
    for line in table.splitlines()[2:]:
        length, *told = (cell.strip() for cell in line.strip("|\n").split("|"))
        for name, cell in zip(names, told, strict=True):
            assert cell == of_seeds([f"{name}{more}" for more in ("", "_million", "_10m", "_100m")], int(length.replace(",", "")))


def test_before_and_after_are_the_records():
    (line,) = re.findall(r"^\| filler, 1,048,576 tokens \|.*$", README, re.M)
    (text,) = re.findall(r"^\| natural text, 1,048,576 tokens \|.*$", README, re.M)
    for told, name in ((line, "repeat_million"), (text, "natural_text_million")):
        plain = re.sub(r"\[(\d+)\]\([^)]*\)", r"\1", told)
        assert [cell.strip() for cell in plain.strip("|").split("|")[1:]] == [
            of_seeds([name], 2**20, "results/passkey_mixed_12m_conv8/linear"), of_seeds([name], 2**20),
        ]  # fmt: skip
    for told, name in re.findall(r"\[(\d+)\]\(results/(passkey_mixed_12m_\w+/(?:linear/)?seed\d/\w+)/record.md\)", README):
        assert told == right_of(read(f"results/{name}/record.json")["rows"]).split()[0]
    both = [read(f"{folder}/seed1/training/record.json") for folder in ("results/passkey_mixed_12m_conv8/linear", FAR)]
    assert f"trained for {sum(record['metrics']['seconds'] for record in both) / 60:.0f} minutes on one H200" in README
    assert f"`experiment=passkey_mixed_12m_far`, {both[1]['metrics']['seconds']:.0f} seconds)" in README


def test_the_first_model_is_its_records():
    folder = "results/passkey_bytes_12m"
    record = read(f"{folder}/training/record.json")
    longest = record["data"]["max_segments"] * record["data"]["segment_length"]
    assert f"trained for {record['metrics']['seconds']:.0f} seconds on texts of at most {longest:,} tokens" in README
    assert f"it finds {right_of(read(f'{folder}/million/record.json')['rows'])} at a million in filler" in README
    rows = read(f"{folder}/untrained/natural_text/record.json")["rows"]
    assert f"{right_of(rows)} up to {max(row['length'] for row in rows):,} in a book" in README


def ablation_runs(folder: str) -> dict[str, dict[str, list[dict]]]:
    """The ablation's finished runs by row and learning rate, each with its own records."""
    found: dict[str, dict[str, list[dict]]] = {}
    for path in sorted((ROOT / folder).glob("*/record.json")):
        training = json.loads(path.read_text())
        asked = dict(override.split("=", 1) for override in training["overrides"])
        records = {name: path.parent / name / "record.json" for name in ("validation", "passkey")}
        rows = {name: json.loads(record.read_text())["rows"] for name, record in records.items() if record.exists()}
        row = asked["experiment"].removeprefix("ablation/")
        found.setdefault(row, {}).setdefault(asked["train.learning_rate"], []).append({"training": training, "seed": asked["seed"], **rows})
    return found


def mean_of(rows: list[dict], what: str, length: int) -> float:
    cells = [row for row in rows if row["length"] == length]
    return sum(row["samples"] * row[what] for row in cells) / sum(row["samples"] for row in cells)


def told_share(shares: list[float]) -> str:
    low, high = (f"{100 * share:.1f}" for share in (min(shares), max(shares)))
    return f"{100 * sum(shares) / len(shares):.1f} %" + (f" ({low} to {high})" if low != high else "")


TABLES = re.findall(r"<!-- ablation: (\S+) -->\n((?:\|.*\n)+)", README)
FOLDER, ABLATION = TABLES[0][0], [line for _, table in TABLES for line in table.splitlines()[2:]]
RATES = ["5e-4", "1e-3", "2e-3"]


def test_no_row_of_the_ablation_is_left_out():
    told = [re.match(r"\| `(\w+)` \|", line)[1] for line in ABLATION]
    assert {folder for folder, _ in TABLES} == {FOLDER}
    assert sorted(told) == sorted(path.stem for path in (ROOT / "conf/experiment/ablation").iterdir())


@pytest.mark.parametrize("line", ABLATION, ids=lambda line: line.split("`")[1])
def test_the_ablation_is_its_records(line):
    row, _, rate, seeds, *cells = [cell.strip(" `") for cell in line.strip(" |").split("|")]
    rates = ablation_runs(FOLDER).get(row, {})
    at_rate = rates.get(rate, [])
    asked = [run for run in at_rate if "passkey" in run]
    assert seeds == f"{len(asked)} of 3" and len({run["seed"] for run in at_rate}) == len(at_rate)
    # The rate is that of the best validation of seed 0; of equals the middle one, then the lower.
    validation = {name: mean_of(run["validation"], "digit_accuracy", 16384) for name, runs in rates.items() for run in runs if run["seed"] == "0"}
    best = [name for name, value in validation.items() if value > max(validation.values()) - 1e-9]
    assert rate == ("1e-3" if "1e-3" in best or not best else min(best, key=RATES.index))
    lengths = (16384, 131072, 1048576)
    shares = [[[mean_of(run["passkey"], what, n) for run in asked] for what in ("exact_match", "digit_accuracy")] for n in lengths]
    told = ["; ".join(map(told_share, both)) if asked else "-" for both in shares]
    metrics = [run["training"]["metrics"] for run in at_rate]
    assert cells == told + [f"{max(found[key] for found in metrics):,}" if metrics else "-" for key in ("gradient_tokens", "text_tokens")]
    assert {run["training"]["metrics"]["steps"] for runs in rates.values() for run in runs} <= {4500}
    # Three seeds at a rate that was tuned, or the text says that it is not finished.
    unfinished = {"short_conv", "gamma_delta", "no_recall", "plain_loss", "short_rows", "paper_inputs", "frozen_gates"}
    assert (seeds == "3 of 3") == (row not in unfinished)
    assert row in unfinished or sorted(validation) == sorted(RATES) or validation == {"1e-3": 1.0}


def test_what_made_the_difference_is_the_records():
    (section,) = re.findall(r"### What made the difference\n(.*?)\n### ", README, re.S)
    runs = ablation_runs(FOLDER)
    # No rate finds a key without dense recall, whose share is 0; the loss of answers stays.
    assert sorted(runs["no_recall"]) == sorted(RATES)
    trainings = [run for [run] in runs["no_recall"].values()]
    assert all(run["training"]["data"]["recall_share_start"] == run["training"]["data"]["recall_share_end"] == 0 for run in trainings)
    asked = [row for run in trainings for what in ("validation", "passkey") for row in run.get(what, [])]
    keys = sum(round(row["samples"] * row["exact_match"]) for row in asked)
    assert f"find {keys} key in {sum(row['samples'] for row in asked)} prompts" in section
    assert f"{min(run['training']['metrics']['answer_loss'] for run in trainings):.1f} nats a digit" in section
    paper = runs["paper_inputs"]["1e-3"][0]
    assert not any(row["exact_match"] for row in paper["passkey"]) and sorted(runs["paper_inputs"]) == ["1e-3"]
    assert paper["training"]["data"]["max_segments"] * paper["training"]["data"]["segment_length"] == 5120
    assert f"in {100 * mean_of(runs['plain_loss']['1e-3'][0]['passkey'], 'exact_match', 131072):.0f} % of prompts of 131,072 and never" in section
    assert mean_of(runs["plain_loss"]["1e-3"][0]["passkey"], "exact_match", 1048576) == 0
    million = {(row, rate): [[cell for cell in run["passkey"] if cell["length"] == 2**20] for run in runs[row][rate]]
               for row, rate in (("linear", "1e-3"), ("delta", "5e-4"), ("qk_norm", "5e-4"), ("write_gate", "5e-4"))}  # fmt: skip
    found = {row: right_of(sum(cells, [])) for (row, _), cells in million.items()}
    assert f"{found['write_gate']}, the three seeds alike, where `qk_norm` at the same rate finds {found['qk_norm']}" in section
    for row in (("linear", "1e-3"), ("delta", "5e-4")):
        assert all(mean_of(cells, "exact_match", 2**20) < 1 for cells in million[row])
        assert mean_of(sum(million[row], []), "exact_match", 2**20) > 0.5
    assert mean_of(runs["frozen_gates"]["5e-4"][0]["validation"], "digit_accuracy", 16384) == 1
    lower = ("delta", "qk_norm", "write_gate", "long_gap")
    found = [round(40 * mean_of(runs[row]["1e-3"][0]["passkey"], "exact_match", 1048576)) for row in lower]
    assert f"finds {found[0]}, {found[1]}, {found[2]} and {found[3]} of 40 keys there" in section
    nan = [json.loads(path.read_text())["error"] or "" for path in (ROOT / FOLDER).glob("*gamma_delta*/job.json")]
    steps = sorted(int(step) - 1 for error in nan for step in re.findall(r"became nan in step (\d+)", error))
    assert f"(in steps {steps[0]:,} and {steps[1]:,} the loss" in section and len(steps) == 2
    compiled = [run["training"]["config"]["settings"]["compile"] for rates in runs.values() for at_rate in rates.values() for run in at_rate]
    assert compiled.count(False) == 7 and "Seven of the trainings" in section


def test_two_trainings_on_a_gpu_are_their_records():
    alone, beside = (ablation_runs(FOLDER)["no_recall"][rate][0]["training"]["metrics"]["tokens_per_second"] for rate in ("1e-3", "5e-4"))
    negative = (ROOT / "results/NEGATIVE.md").read_text()
    assert f"alone on an H200 learned {alone / 1e6:.2f}M tokens/s" in negative and f"as one of two on an H200 {beside / 1e6:.2f}M\n" in negative
    assert f"learn [{2 * beside / alone:.1f} times](results/NEGATIVE.md#two-trainings-on-one-gpu)" in README


def test_peak_memory_does_not_grow():
    peaks = {row["peak_memory_bytes"] for row in read(f"{FAR}/seed1/peak_memory/record.json")["rows"]}
    assert len(peaks) == 1 and "the same to the byte" in README


def test_the_long_prompt_is_its_record():
    short, long = [row for row in read("results/long_prompt/record.json")["rows"] if row["way"] == "generate"]
    growth = (long["peak_memory_bytes"] - short["peak_memory_bytes"]) / (long["length"] - short["length"])
    assert long["exact"] and long["length"] == 2**20
    assert f"in {long['seconds']:.1f} seconds at {growth:.0f} bytes a token" in README


def test_drift_is_its_record():
    rows = read("results/drift/record.json")["rows"]
    (last,) = [row for row in rows if row["tokens"] == 10_485_760]
    assert f"within {last['read_error']:.0e} of its fp64 copy" in README


def test_how_far_training_reached_is_its_records():
    records = [read(f"{FAR}/seed{seed}/training/record.json") for seed in (0, 1)]
    gradient, text = (max(record["metrics"][key] for record in records) for key in ("gradient_tokens", "text_tokens"))
    assert f"at most {gradient:,} tokens that were really read" in README
    assert f"States of texts of up to {text:,} tokens were seen" in README
    for seed, record in enumerate(records):
        assert f"{record['metrics']['parameters'] / 1e6:.1f}M-parameter" in README
        assert record["seeds"]["train"] == record["data"]["seed"] == seed
        assert [gpu["name"] for gpu in record["machine"]["gpus"]] == ["NVIDIA H200"]
        assert record["data"]["gap_share"] == 0.5 and record["metrics"]["steps"] == 2000


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_its_python_runs(block, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert "48213" in capsys.readouterr().out or "48213" not in block  # the shipped model finds the key


def commands() -> list[list[str]]:
    """The words of each command line in the README's shell blocks."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ").splitlines()
    return [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]


@pytest.mark.parametrize("words", [words[1:] for words in commands() if words[:1] == ["infini"] and words[1] != "report"], ids=" ".join)
def test_its_commands_have_only_keys_that_are_read(words):
    """Composed, not run: of a sweep its first job, without what belongs to Hydra or to the search for runs."""
    name, *overrides = words
    first = [re.sub(r"^([^=]+=[^\[{,]+),.*", r"\1", word) for word in overrides]
    ours = [word for word in first if word != "-m" and not word.startswith(("hydra", *(["runs="] if name == "train" else [])))]
    assert compose(name, ours)


@pytest.mark.parametrize("words", [words for words in commands() if "infini.evaluate" in words], ids=" ".join)
def test_its_lm_eval_tasks_are_there(words):
    options = dict(itertools.pairwise(words))
    assert all((ROOT / f"tasks/lm_eval/{task}.yaml").is_file() for task in options["--tasks"].split(","))
    assert json.loads(options["--metadata"]) and options["--model"] == "infini"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


NEGATIVE = (ROOT / "results/NEGATIVE.md").read_text()


@pytest.mark.parametrize(
    ("source", "cells"),
    re.findall(r"^\| \[[^]]*\]\((?:results/)?(\S+)\.md\) \|((?: *(?:\d+ of \d+)? \|)+)$", NEGATIVE + README, re.M),
)
def test_needles_are_told_with_the_numbers_of_their_records(source, cells):
    rows = read(f"results/{source}.json")["rows"]
    lengths = sorted({row["length"] for row in rows})
    told = [cell.strip() for cell in cells.split("|")]
    assert told[: len(lengths)] == [right_of([row for row in rows if row["length"] == length]) for length in lengths]


@pytest.mark.parametrize(("folder", "table"), re.findall(r"<!-- needles: (\S+) -->\n((?:\|.*\n)+)", NEGATIVE + README))
def test_two_seeds_are_told_with_the_numbers_of_their_records(folder, table):
    lengths = [int(cell.replace(",", "")) for cell in re.findall(r"[\d,]+", table.splitlines()[0])]
    assert lengths[-1] == 2**20
    for line in table.splitlines()[2:]:
        name, told = re.search(r"\(`(\w+)`\)", line)[1], [cell.strip() for cell in line.strip(" |").split("|")[1:]]
        for length, cell in zip(lengths, told, strict=False):
            right = []
            for seed in (0, 1):
                sources = [f"{folder}/seed{seed}/{name}{more}/record.json" for more in ("", "_million")]
                rows = [row for source in sources if (ROOT / source).exists() for row in read(source)["rows"]]
                right.append(right_of([row for row in rows if row["length"] == length]))
            assert cell == (", ".join([right[0].split()[0], right[1]]) if right[0] != "0 of 0" else "")


BENCHMARKS = "results/benchmarks/h100"


def row_of(source: str, **wanted) -> dict:
    (row,) = [row for row in read(source)["rows"] if all(row.get(key) == value for key, value in wanted.items())]
    return row


def test_speed_is_that_of_the_records():
    layer = [row_of(f"{BENCHMARKS}/layer/record.json", what="Infini-attention", rule=rule, direction=direction)["ratio"]
             for direction in ("forward", "forward + backward") for rule in ("linear", "delta")]  # fmt: skip
    assert "| {:.2f}, {:.2f} |".format(*layer[:2]) in README and "| {:.2f}, {:.2f} |".format(*layer[2:]) in README
    memory = [row_of(f"{BENCHMARKS}/layer/record.json", what="memory part", rule=rule, direction="forward")["floor_ratio"]
              for rule in ("linear", "delta", "deltanet")]  # fmt: skip
    assert "| {:.2f}, {:.2f} |".format(*memory[:2]) in README and f"of `deltanet` takes {memory[2]:.0f} times the floor" in README
    whole = row_of(f"{BENCHMARKS}/full/record.json", what="Infini-attention", tokens=2**20)
    assert f"| {1 / whole['ratio']:.0f} |" in README
    step = row_of(f"{BENCHMARKS}/step/record.json", what="training step", rule="linear", compiled=True)
    assert f"| {1 / step['ratio']:.2f}; {step['flop_utilization']:.0%} |".replace("%", " %") in README
    ways = (("training step", None), ("training step", True), ("reading", None))
    shipped = [1 / row_of(f"{BENCHMARKS}/shipped/record.json", what=what, backend="triton", compiled=way)["ratio"] for what, way in ways]
    assert "| {:.2f}, {:.2f}; {:.2f} |".format(*shipped) in README


def test_prefill_is_that_of_the_record():
    source = f"{BENCHMARKS}/prefill/record.json"
    rate = {row["tokens"]: row["tokens_per_second"] for row in read(source)["rows"] if row["what"] == "prefill" and row["compiled"]}
    assert f"| {rate[2**20] / max(rate.values()):.3f}; {rate[2**20] / 1e6:.2f} |" in README


def test_decoding_is_that_of_the_record():
    first, last = (row_of("results/decode/record.json", model="infini", path="graph", context=n) for n in (4096, 2**20))
    assert f"| {last['milliseconds'] / first['milliseconds']:.2f}; {last['milliseconds']:.2f} |" in README
    plain = [row_of("results/decode/record.json", model="plain", path="graph", context=n)["milliseconds"] for n in (4096, 131072, 2**20)]
    assert "in {:.2f} ms after 4,096, in {:.2f} ms after 131,072 and in {:.2f} ms".format(*plain) in README
    cache = row_of("results/decode/record.json", model="plain", path="graph", context=2**20)["state_bytes"]
    assert f"takes {cache / 1e9:.1f} GB and still fits; the memory's state takes {last['state_bytes'] / 1e6:.1f} MB" in README


def test_a_million_tokens_are_read_as_fast_as_fewer():
    rate = {row["length"]: row["tokens_per_second"] / 1e6 for row in read(f"{BENCHMARKS}/reading/record.json")["rows"]}
    assert f"read at {rate[2**20]:.1f}M tokens/s on one H100" in README and rate[2**20] > 0.98 * rate[131072]


def test_lm_eval_is_the_record():
    rows = [row for row in read("results/lm_eval/record.json")["rows"] if row["metric"] == "exact_match"]
    told = [f"{round(row['value'] * row['samples'])} of {row['samples']}" for row in rows]
    assert [row["task"] for row in rows] == ["infini_passkey", "infini_niah_single_1"]
    assert f"answers {told[0]} passkeys and {told[1]} of `niah_single_1` at 4,096 and 131,072 tokens" in README


def test_windows_are_those_of_the_record():
    shape = {"rows": 1, "tokens": 131072, "heads": 8, "groups": 8, "head_dim": 128, "segment_length": None, "window": 2048, "document": 0}
    source = "results/benchmarks/h200/reach/record.json"
    rows = [row_of(source, kernel="triton", shape=shape, direction=way) for way in ("forward", "forward + backward")]
    ratios = [row["ratio"] for row in rows if row["against"] == "bands"]
    assert "| {:.2f}; {:.2f} |".format(*ratios) in README


def test_decoding_of_a_billion_parameters_is_that_of_the_record():
    first, last = (row_of("results/decode_1b/record.json", model="infini", path="graph", context=n) for n in (4096, 2**20))
    assert f"| {last['milliseconds'] / first['milliseconds']:.2f}; {last['milliseconds']:.2f} |" in README
    plain = [row_of("results/decode_1b/record.json", model="plain", path="graph", context=n)["milliseconds"] for n in (4096, 131072)]
    assert "in {:.2f} ms after 4,096 and {:.2f} ms after 131,072".format(*plain) in README
    large = row_of("results/decode_1b/record.json", model="plain", context=2**20)
    assert large["out_of_memory"] and f"its cache of {large['state_bytes'] / 1e9:.0f} GB" in README
    assert f"the memory's state takes {last['state_bytes'] / 1e6:.0f} MB" in README
