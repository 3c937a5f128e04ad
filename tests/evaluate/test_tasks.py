"""The YAML tasks, end to end through lm-eval, with no network."""

import json
import sys
from pathlib import Path

import lm_eval
import pytest
from infini.tasks.lm_eval import documents
from infini.tasks.passkey.benchmark import PasskeyBenchmark, draw_questions
from infini.tasks.passkey.prompt import Haystack, build_prompt
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from infini.data.tokenizer import ByteTokenizer
from infini.errors import InputError

FOLDER = Path(__file__).parents[2] / "tasks" / "lm_eval"


class Oracle(LM):
    """Answers what follows the last "pass key is " or "is: " that names a number."""

    def generate_until(self, requests, **options):
        return [" " + request.args[0].replace("is: ", "pass key is ").split("pass key is ")[1].split(".")[0] for request in requests]

    def loglikelihood(self, requests, **options):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests, **options):
        return [-0.5 * len(request.args[0].encode()) for request in requests]


def evaluate(model, tasks, metadata, **options):
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)
    return lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)["results"]


@pytest.mark.parametrize("task", ["infini_passkey", "infini_niah_single_1"])
def test_who_knows_the_answer_is_right_and_who_does_not_is_wrong(task, wrap):
    metadata = {"lengths": [700, 800], "depths": [0, 1], "samples": 2}
    found = evaluate(Oracle(), [task], metadata)[task]
    assert found["exact_match,none"] == 1.0
    assert found["by_cell,none"] == {f"{length} at {depth}": 1.0 for length in (700, 800) for depth in (0, 1)}
    (wrong,) = evaluate(wrap(batch_size=3), [task], metadata, limit=3).values()
    assert wrong["exact_match,none"] == 0.0 and wrong["sample_len"] == 3


def test_the_prompts_are_those_of_infini_passkey():
    rows = documents.passkey(lengths=[600], depths=[0.5], samples=3, seed=4)["test"]
    settings, tokenizer = PasskeyBenchmark(lengths=(600,), depths=(0.5,), samples=3, seed=4), ByteTokenizer()
    haystack = Haystack.load("repeat", tokenizer)
    for row, one in zip(rows, draw_questions(settings, haystack, 600, 0.5), strict=True):
        prompt = build_prompt(tokenizer, 600, 0.5, one.key, haystack, one.phase, one.quiz)
        assert tokenizer.encode(row["text"]) == prompt.ids.tolist() and row["key"] == one.key


def test_bits_per_byte_of_text_files(tmp_path, wrap):
    (tmp_path / "a.txt").write_text("a text of some words\n\n  and a second line")
    (tmp_path / "b.txt").write_text("é" * 50)
    asked = (["infini_perplexity"], {"text": str(tmp_path / "*.txt")})
    (found,) = evaluate(Oracle(), *asked).values()
    assert found["bits_per_byte,none"] == pytest.approx(0.5 / 0.6931471805599453)  # every byte of the files counts once
    one, four = (evaluate(wrap(batch_size=size), *asked)["infini_perplexity"] for size in (1, 4))
    assert one["bits_per_byte,none"] == pytest.approx(four["bits_per_byte,none"], rel=1e-6)


def test_bad_metadata_is_refused():
    for metadata, sentence in (
        ({"lengths": 4096}, "lengths is 4096; give a list"),
        ({"lengths": [40]}, "length is 40 tokens, but the passkey text alone takes"),
        ({"depths": [2]}, "depth is 2"),
    ):
        with pytest.raises(InputError, match=sentence):
            documents.passkey(**metadata)
    with pytest.raises(InputError, match="no text is named"):
        documents.texts()
    with pytest.raises(InputError, match="text file nowhere.txt does not exist"):
        documents.texts(text="nowhere.txt")


def test_the_command_line_is_lm_evals_with_our_tasks(monkeypatch, capsys):
    from infini.evaluate.__main__ import main

    asked = ["run", "--model", "infini", "--tasks", "infini_passkey"]
    seen = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(sys.argv[1:]))
    for given in (asked, [*asked, "--include_path", "mine"]):
        monkeypatch.setattr("sys.argv", ["evaluate", *given])
        assert main() == 0
    assert seen[0][:-1] == [*asked, "--include_path"] and Path(seen[0][-1]).samefile(FOLDER)
    assert seen[1] == [*asked, "--include_path", "mine"]

    monkeypatch.setattr("sys.argv", ["evaluate", *asked, "--record"])
    assert main() == 2 and "--record needs a folder" in capsys.readouterr().err

    def fail():
        raise InputError("there is no such thing")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", fail)
    monkeypatch.setattr("sys.argv", ["evaluate", *asked])
    assert main() == 2
    assert capsys.readouterr().err == "error: there is no such thing\n"


def test_what_lm_eval_found_is_kept_with_its_provenance(monkeypatch, tmp_path, capsys, transformer):
    from infini.evaluate.__main__ import main
    from infini.report.record import read_record

    transformer.save_pretrained(tmp_path / "model")
    model = "infini"

    def command_line():  # lm-eval's own, but for the search through all of its tasks and its look at the machine
        arguments = {"model_args": f"pretrained={tmp_path / 'model'}", "device": "cpu"}
        metadata = {"lengths": [600], "depths": [0, 1], "samples": 1, "seed": 3}
        manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)
        found = lm_eval.simple_evaluate("infini", tasks=["infini_passkey"], task_manager=manager, bootstrap_iters=0, log_samples=False, **arguments)
        found["config"]["model"] = model
        assert sys.argv[-2] == "--output_path"
        Path(sys.argv[-1], "results_now.json").write_text(json.dumps(found, default=str))

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", command_line)
    monkeypatch.setattr("sys.argv", ["evaluate", "run", "--record", str(tmp_path / "kept")])
    assert main() == 0
    record = read_record(tmp_path / "kept" / "record.json")
    assert record["kind"] == "lm_eval" and record["config"]["tasks"]["infini_passkey"]["lengths"] == [600]
    rows = {row["metric"]: row for row in record["rows"]}
    assert rows["exact_match"]["value"] == 0.0 and rows["exact_match"]["samples"] == 2
    assert rows["by_cell"]["value"] == {"600 at 0": 0.0, "600 at 1": 0.0}
    assert "| infini_passkey | by_cell | 2 | 600 at 0: 0, 600 at 1: 0 |" in (tmp_path / "kept" / "record.md").read_text()
    assert str(tmp_path / "kept" / "record.md") in capsys.readouterr().out
    model = "dummy"
    monkeypatch.setattr("sys.argv", ["evaluate", "run", "--record", str(tmp_path / "other")])
    assert main() == 2 and "--record is for --model infini, not for 'dummy'" in capsys.readouterr().err
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: None)
    monkeypatch.setattr("sys.argv", ["evaluate", "run", "--record", str(tmp_path / "other")])
    assert main() == 2 and "lm-eval left no results to keep" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_last_results_are_kept_with_their_seeds(transformer, tmp_path):
    from infini.evaluate.kept import keep

    transformer.save_pretrained(tmp_path / "model")
    about = {"model": "infini", "model_args": {"pretrained": str(tmp_path / "model")}, "random_seed": 0, "torch_seed": 1234, "fewshot_seed": None}
    for day, value in ((1, 0.25), (2, 0.5)):
        found = {"config": about, "configs": {}, "results": {"a": {"acc,none": value}}}
        (tmp_path / f"results_2026-01-0{day}.json").write_text(json.dumps(found))
    record = json.loads(keep(tmp_path, tmp_path / "kept", 0.0)[0].read_text())
    assert record["seeds"] == {"random_seed": 0, "torch_seed": 1234} and record["rows"][0]["value"] == 0.5
