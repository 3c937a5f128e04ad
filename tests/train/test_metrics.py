import json
import sys
import time

import pytest
import torch

from infini.errors import InputError
from infini.train.loss import LossSums
from infini.train.metrics import MetricsLog
from infini.train.step import StepResult
from infini.train.window import Window


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_going_on_drops_what_will_be_done_again_and_a_cut_line(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in (2, 4, 5):
            log.write({"step": step, "loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    with MetricsLog(tmp_path, 4) as log:
        log.write({"step": 6, "loss": 0.5})
        assert log.last("loss") == {"step": 6, "loss": 0.5}
        assert log.last("knockout") is None
    assert rows(tmp_path) == [{"step": 2, "loss": 0.5}, {"step": 4, "loss": 0.25}, {"step": 6, "loss": 0.5}]


def test_tensorboard_that_is_missing_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="infini-attention.tensorboard"):
        MetricsLog(tmp_path, tensorboard=True)


def result(tokens, answers, norm, *counts):
    sums = LossSums(torch.tensor(float(tokens)), torch.tensor(float(answers)))
    return StepResult(sums, torch.tensor(float(norm)), *counts)


def test_losses_are_means_over_all_tokens_of_the_window_not_means_of_means():
    window = Window()
    window.add(1, result(10, 4, 1, 10, 1))
    window.add(2, result(90, 8, 3, 30, 3))
    assert window.tokens == 40
    assert window.read() == {"loss": 5.5, "token_loss": 2.5, "answer_loss": 3.0, "gradient_norm": 2.0}


def test_a_window_is_as_long_as_its_steps_took():
    before = time.perf_counter()
    window = Window()
    time.sleep(0.01)
    window.add(1, result(1, 1, 1, 1, 1))
    window.read()
    assert 0.01 <= window.seconds <= time.perf_counter() - before


def test_the_loss_told_is_the_one_minimized():
    for weights in ((0.5, 1.0), (1.0, 0.0)):
        window = Window(*weights)
        window.add(1, result(100, 8, 1, 40, 2))
        assert window.read()["loss"] == weights[0] * 2.5 + weights[1] * 4.0


def test_without_answers_there_is_no_answer_loss():
    window = Window()
    window.add(1, result(10, 0, 1, 10, 0))
    assert window.read()["answer_loss"] is None


@pytest.mark.parametrize(("loss", "norm", "what"), [("nan", "1", "loss"), ("1", "inf", "gradient norm")])
def test_the_first_step_that_is_not_finite_is_named(loss, norm, what):
    window = Window()
    window.add(4, result(1, 1, 1, 1, 1))
    for step in (5, 6):
        window.add(step, result(loss, 1, norm, 1, 1))
    with pytest.raises(InputError, match=f"the {what} became (nan|inf) in step 5:"):
        window.read()
