"""lm-eval's own long-context tasks, as installed, on local stand-ins of their data: prompts, our model, scores.

Only what would come from a network or an optional package stands in: data sets of the same columns and splits, one metric,
a list of words. YAML, prompts, generation and scoring are lm-eval's.
"""

import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import lm_eval
import pytest
from infini.tasks.lm_eval import documents
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from infini.evaluate.__main__ import main

LM_EVAL, OURS = Path(lm_eval.__file__).parent / "tasks", Path(__file__).parents[2] / "tasks" / "lm_eval"
BOOK = "The story of a whale. It swims. " * 40
INFINITE = {"id": 0, "context": f"{BOOK}The pass key is 71432. {BOOK}", "input": "What is the pass key?", "answer": ["71432"], "options": []}
LONG = {"_id": "1", "length": 9, "dataset": "-", "language": "en", "all_classes": []}
CHOICES = "Who hunts?\n\n (A) Ahab (B) Ishmael (C) Queequeg (D) Starbuck\n\n"
HUB = {  # path, configuration, split -> rows, with the columns that lm-eval's tasks read
    ("RMT-team/babilong-1k-samples", "0k", "qa1"): [{"input": f"Mary went to the office. {BOOK}", "question": "Where is Mary?", "target": "office"}],
    ("Xnhyacinth/LongBench", "narrativeqa", "test"): [{"context": BOOK, "question": "What is it?", "answers": ["a whale"], **LONG}],
    ("Xnhyacinth/LongBench", "passage_count", "test"): [{"context": "Paragraph 1: a", "question": "", "answers": ["17"], **LONG}],
    ("baber/paul_graham_essays", None, "train"): [{"text": "One sentence of an essay. And here is another one, longer.\n" * 300}],
    ("xinrongzhang2022/InfiniteBench", None, "passkey"): [INFINITE],
    ("xinrongzhang2022/InfiniteBench", None, "kv_retrieval"): [INFINITE | {"context": '{"k": "a-1"}', "input": 'Value of "k"?', "answer": ["a-1"]}],
    ("quality", None, "validation"): [{"id": "a", "pid": "a_0", "input": CHOICES + BOOK, "output": "Ahab"}],
    ("qasper", None, "validation"): [
        {"id": "b", "pid": "b_0", "input": f"Is it a whale?\n\n{BOOK}", "output": "Yes"},
        {"id": "c", "pid": "c_0", "input": f"What is it?\n\n{BOOK}", "output": "a whale"},
        {"id": "c", "pid": "c_1", "input": f"What is it?\n\n{BOOK}", "output": "one whale"},
    ],
    ("gov_report", None, "validation"): [{"id": "d", "pid": "d_0", "input": BOOK, "output": "a whale"}],
}
# folder of the task, task, metric, what the right answer is.
RULER = re.compile(r"One of the special magic numbers for \S+ is: (\d+)")
TASKS = [
    ("babilong", "babilong_qa1", "acc,none", "The most recent location of Mary is office."),
    ("longbench", "longbench_narrativeqa", "qa_f1_score,none", "The whale"),
    ("longbench", "longbench_passage_count", "count_score,none", "17"),
    ("ruler", "niah_single_2", "4096,none", RULER),
    ("scrolls", "scrolls_quality", "acc,none", " Ahab"),
    ("scrolls", "scrolls_qasper", "f1,none", "a whale"),
    ("scrolls", "scrolls_govreport", "rouge1,none", "a whale"),
    (OURS, "infini_infinitebench_passkey", "exact_match,none", " 71432."),
    (OURS, "infini_infinitebench_kv_retrieval", "exact_match,none", '"a-1"'),
]


class Metric:
    """In the place of SCROLLS' metric, which comes from the hub."""

    def compute(self, predictions, references):
        right = sum(answer.strip().lower() in map(str.lower, known) for answer, known in zip(predictions, references, strict=True)) / len(references)
        return {"f1": right, "rouge/rouge1": right, "rouge/rouge2": right, "rouge/rougeL": right}


@pytest.fixture(autouse=True)
def local(tmp_path, monkeypatch):
    """Data sets from files of this folder, optional packages where they are missing."""
    import datasets
    import evaluate
    import huggingface_hub
    import nltk

    real = datasets.load_dataset
    for (path, name, split), rows in HUB.items():
        file = tmp_path / "hub" / path / (name or "default") / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if split == "validation":
            file.with_stem("train").write_text(file.read_text())

    def load(path, name=None, split=None, data_files=None, **options):
        if path == "json":  # SCROLLS: a member of a zip on the hub
            path, split = re.match(r"zip://(.+?)/validation\.jsonl::https:", data_files["validation"])[1], None
        files = {file.stem: str(file) for file in (tmp_path / "hub" / path / (name or "default")).glob("*.jsonl")}
        return real("json", data_files=files, split=split, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(evaluate, "load", lambda *args, **options: Metric())
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda **options: str(tmp_path / "scrolls.py"))
    (tmp_path / "scrolls.py").touch()
    monkeypatch.setattr(nltk.data, "find", lambda *args: None)
    monkeypatch.setattr(nltk, "sent_tokenize", lambda text: re.split(r"(?<=[.])\s", text))
    words = {"nouns": ["tree", "river"], "adjectives": ["red", "tall"], "verbs": ["walk"]}
    stand_in(monkeypatch, "wonderwords", RandomWord=type("RandomWord", (), {"_categories": words}))
    stand_in(monkeypatch, "jieba")
    stand_in(monkeypatch, "fuzzywuzzy", fuzz=None)
    stand_in(monkeypatch, "rouge", Rouge=None)
    # lm-eval 0.4.13 imports this for SCROLLS; transformers 5.23 has it no more.
    stand_in(monkeypatch, "transformers.data.metrics", squad_metrics=types.SimpleNamespace(normalize_answer=lambda text: text.lower().strip()))


def stand_in(monkeypatch, name, **contents):
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return
    module = types.ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


class Knows(LM):
    """Says the right answer, and finds it likeliest."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def generate_until(self, requests, **options):
        return [self.answer if isinstance(self.answer, str) else self.answer.search(request.args[0])[1] for request in requests]

    def loglikelihood(self, requests, **options):
        return [(0.0, True) if request.args[1] in (self.answer, " yes") else (-1.0, False) for request in requests]

    def loglikelihood_rolling(self, requests, **options):
        raise NotImplementedError


@pytest.fixture(scope="module")
def checkpoint(transformer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    transformer.save_pretrained(folder)
    return str(folder)


@pytest.mark.filterwarnings("ignore")  # lm-eval's and its libraries' own
@pytest.mark.parametrize(("where", "task", "metric", "answer"), TASKS, ids=[task for _, task, *_ in TASKS])
def test_a_task_of_the_hub(where, task, metric, answer, checkpoint):
    assert callable(main)  # the door of the command line registers model and tokenizer

    def evaluate(model, **options):
        manager = TaskManager(include_path=str(LM_EVAL / where), include_defaults=False, metadata={"pretrained": checkpoint})
        return lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0, limit=2, **options)

    found = evaluate("infini", model_args=f"pretrained={checkpoint}", device="cpu", batch_size=2, log_samples=True)
    assert metric in found["results"][task] and found["results"][task]["sample_len"] >= 1
    assert found["config"]["model"] == "infini"
    if task != "scrolls_quality":  # of four choices the first may be the likeliest by chance
        assert found["results"][task][metric] == 0.0
    assert evaluate(Knows(answer))["results"][task][metric] == 1.0


def test_infinitebench_is_read_with_its_columns():
    rows = documents.infinitebench(split="passkey")["passkey"]
    assert rows[0]["answer"] == ["71432"] and set(rows.column_names) == {"id", "context", "input", "answer", "options"}
