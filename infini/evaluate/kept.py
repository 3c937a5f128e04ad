"""What lm-eval found, as a record of this library: the numbers beside command, commit, weights, machine and versions."""

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from infini import checkpoint
from infini.errors import InputError
from infini.loading import load
from infini.report.fingerprint import fingerprint
from infini.report.record import make_record, write_record
from infini.report.render import render
from infini.train.reach import read_reach

# What of lm-eval's description of a run decides its numbers.
SETTINGS = ("model", "model_args", "batch_size", "device", "limit", "gen_kwargs")


def keep(results: Path, output: Path, started: float) -> list[Path]:
    """Write `output`/record.json and its table from the file that lm-eval left in a folder.

    Args:
        results: lm-eval's `--output_path` of one run.
        output: a folder; made if it is missing.
        started: `time.time()` when it began.

    Returns:
        The files written, the record first.

    Raises:
        InputError: lm-eval left no results, or the model was not one of this library.
    """
    files = sorted(results.rglob("results_*.json"))
    if not files:
        raise InputError("lm-eval left no results to keep; --record needs a run that scores a task")
    found = json.loads(files[-1].read_text())
    if found["config"].get("model") != "infini":
        raise InputError(f"--record is for --model infini, not for {found['config'].get('model')!r}; use --output_path alone")
    asked = found["config"]["model_args"]
    folder = checkpoint.resolve(asked.get("pretrained") if isinstance(asked, Mapping) else None)
    reach = read_reach(folder)
    data = {"checkpoint_sha256": fingerprint(load(folder))}
    config = {name: found["config"].get(name) for name in SETTINGS} | {"lm_eval": metadata.version("lm_eval")}
    config["tasks"] = {task: values.get("metadata") for task, values in found["configs"].items()}
    seeds = {name: value for name, value in found["config"].items() if name.endswith("_seed") and isinstance(value, int)}
    record = make_record(
        "lm_eval",
        config=config,
        data=data if reach is None else data | {"trained": reach},
        seeds=seeds,
        started=started,
        rows=rows_of(found["results"], found.get("n-samples", {})),
    )
    record["command"] = f"python {record['command']}" if record["command"].startswith("-m ") else record["command"]
    write_record(record, output / "record.json")
    return [output / "record.json", *render(output / "record.json")]


def rows_of(results: Mapping[str, Mapping[str, Any]], samples: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """One row for each task and metric: task, metric, samples, value.

    Example:
        >>> rows_of({"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1}}, {"a": {"effective": 4, "original": 9}})
        [{'task': 'a', 'metric': 'acc', 'samples': 4, 'value': 0.5}]
    """
    rows = []
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric = name.partition(",")[0]
            if "," in name and not metric.endswith("_stderr"):
                rows.append({"task": task, "metric": metric, "samples": samples.get(task, {}).get("effective"), "value": value})
    return rows
