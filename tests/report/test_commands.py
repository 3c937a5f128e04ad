"""Commands of a sweep are told in few lines, and nothing is told that no run was asked for by its own key."""

import time

from infini.report.commands import together
from infini.report.record import make_record
from infini.report.sweep import Run, Setting, Sweep
from infini.report.sweep_tables import provenance


def test_values_are_gathered_and_each_stays_behind_its_own_key():
    asked = [f"infini train model={model} train.learning_rate={rate} output='runs/{model} {rate}'" for model in ("rmt", "full") for rate in (1, 2)]
    assert together(asked) == ["infini train model={full,rmt} train.learning_rate={1,2} output={runs/full 1,runs/full 2,runs/rmt 1,runs/rmt 2}"]
    assert together(reversed(asked)) == together(asked + asked)


def test_other_keys_other_orders_and_other_commands_are_lines_of_their_own():
    asked = ["infini train a=1 b=2", "infini train b=2 a=1", "infini train a=1", "infini passkey a=1", "infini train a=2 b=2", "infini train -m a=1"]
    assert together(asked) == [
        "infini passkey a=1",
        "infini train -m a=1",
        "infini train a=1",
        "infini train a={1,2} b=2",
        "infini train b=2 a=1",
    ]


def test_of_many_values_only_the_key_is_told_and_one_line_is_quoted_as_it_was():
    assert together(f"infini train seed=0 output=runs/{i}" for i in range(13)) == ["infini train seed=0 output=..."]
    assert together(["infini perplexity 'texts=[a b/*.txt]'"]) == ["infini perplexity 'texts=[a b/*.txt]'"]


def test_a_sweep_tells_them_so(monkeypatch):
    def ran(seed: int) -> Run:
        monkeypatch.setenv("INFINI_COMMAND", f"infini train model=rmt seed={seed}")
        return Run({"seed": str(seed)}, make_record("train", config={}, data={}, seeds={}, started=time.time(), metrics={}))

    told = provenance(Sweep((), (Setting((), "", (ran(0), ran(1))),)))
    assert "- records: 2, of 2 runs\n- command: `infini train model=rmt seed={0,1}`\n- commit: " in told
