"""What cannot be used ends in one sentence that names the value and the remedy."""

import pytest

from infini.cli import passkey, train
from infini.cli.compose import compose
from infini.errors import InputError

COMPOSED = [
    ("passkey", ["lenghts=[4096]"], "nothing reads lenghts; did you mean lengths?"),
    ("passkey", ["zzz=1"], "nothing reads zzz; see infini passkey --help"),
    ("passkey", ["lengths=[4096"], "'lengths=[4096' cannot be read"),
    ("passkey", ["grid=galaxy"], "there is no grid/galaxy: use one of full, laptop, short"),
    ("passkey", ["samples=1,2"], "a list is written [a,b]"),
    ("passkey", ["grid=laptop", "depths=[0.5]"], "depths=[0.5] is of another form than the value that it replaces"),
    ("train", ["output=x", "train.stepz=3"], "nothing reads train.stepz; did you mean train.steps?"),
    ("train", [], "output is missing: give output=..."),
    ("train", ["output=x", "experiment=ablation/galaxy"], "there is no experiment/ablation/galaxy: use one of delta, deltanet,"),
    ("train", ["output=x", "model=galaxy"], "there is no model/galaxy: use one of full, full_row,"),
]
BUILT = [
    ("passkey", ["+foo=1"], "nothing reads foo"),
    ("passkey", ["samples=many"], "samples is 'many' but must be a whole number"),
    ("passkey", ["samples=1.5"], "samples is 1.5 but must be a whole number"),
    ("passkey", ["lengths=4096"], "lengths is 4096 but must be a list, each a whole number"),
    ("passkey", ["depths=[0,deep]"], "depths is [0, 'deep'] but must be"),
    ("passkey", ["dtype=int8"], "dtype is 'int8' but must be one of float32, bfloat16, float16 or null"),
    ("passkey", ["checkpoint=a", "hf=b"], "checkpoint is a and hf is b: give one of them"),
    ("train", ["output=x", "+foo=1"], "nothing reads foo"),
    ("train", ["output=x", "+model.hiden_size=1"], "nothing reads model.hiden_size; did you mean hidden_size?"),
    ("train", ["output=x", "train.compile=maybe"], "train.compile is 'maybe' but must be true or false"),
    ("train", ["output=x", "~task.steps"], "task.steps is missing: give it a value"),
    ("train", ["output=x", "model._target_=os.system"], "must name something of infini or baselines"),
    ("train", ["output=x", "model._target_=infini.config.Nothing"], "there is no such name"),
]


@pytest.mark.parametrize(("name", "overrides", "sentence"), COMPOSED, ids=str)
def test_composition(name, overrides, sentence):
    with pytest.raises(InputError) as error:
        compose(name, overrides)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "overrides", "sentence"), BUILT, ids=str)
def test_building(name, overrides, sentence):
    config = compose(name, overrides)
    with pytest.raises(InputError) as error:
        {"passkey": passkey, "train": train}[name].read(config)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_whole_numbers_are_numbers():
    _, settings, _ = passkey.read(compose("passkey", ["depths=[0,1]", "lengths=[4096]"]))
    assert settings.depths == (0.0, 1.0)
    assert all(isinstance(depth, float) for depth in settings.depths)
