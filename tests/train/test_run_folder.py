import pytest

from infini.errors import InputError
from infini.train.run_folder import claim, whole_folder


def test_the_same_run_may_come_back_and_another_is_told_the_difference(tmp_path):
    folder = tmp_path / "run"
    claim(folder, {"settings": {"rate": 0.1, "betas": (0.9, 0.95)}, "seed": 1})
    claim(folder, {"settings": {"rate": 0.1, "betas": (0.9, 0.95)}, "seed": 1})
    with pytest.raises(InputError, match=r"settings.rate = 0.1, not 0.2: choose another output"):
        claim(folder, {"settings": {"rate": 0.2, "betas": (0.9, 0.95)}, "seed": 1})


def test_a_folder_of_unknown_results_is_left_alone(tmp_path):
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(InputError, match="holds record.json but no run.json"):
        claim(tmp_path, {})
    assert not (tmp_path / "run.json").exists()


def test_a_folder_that_fails_to_fill_does_not_replace_the_old(tmp_path):
    final = tmp_path / "model"
    with whole_folder(final) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), whole_folder(final) as folder:
        (folder / "a").write_text("new")
        1 / 0
    assert (final / "a").read_text() == "old"
    with whole_folder(final) as folder:
        (folder / "b").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "b"]
