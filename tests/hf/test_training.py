"""Trainer and PEFT, with the gates of the memory learning too."""

import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import HPSearchBackend

import infini
from infini.errors import InputError
from infini.hf import InfiniForCausalLM, InfiniHFConfig, KeepGates, load_gates, save_gates, train_gates
from infini.hf.adapters import gates_of
from tests.hf.conftest import LONG, SHAPE

FUTURE = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"  # PEFT asks for it


@pytest.fixture
def rows():
    row = list(b"abcdefgh" * 5)
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for _ in range(8)]


def trainer_of(model, rows, folder, callbacks=(), **changes):
    asked = dict(per_device_train_batch_size=4, max_steps=8, learning_rate=1e-2, report_to="none", disable_tqdm=True)
    asked |= dict(logging_strategy="no", save_strategy="no", use_cpu=True, dataloader_pin_memory=False, seed=0)
    arguments = TrainingArguments(output_dir=str(folder), **asked | changes)
    data = dict(train_dataset=rows, eval_dataset=rows, data_collator=default_data_collator)
    what = {"model": model} if isinstance(model, torch.nn.Module) else {"model_init": model}
    return Trainer(**what, args=arguments, **data, callbacks=list(callbacks))


def fit(model, rows, folder, callbacks=(), **changes):
    trainer = trainer_of(model, rows, folder, callbacks, **changes)
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=changes.get("resume_from_checkpoint"))
    return trainer, before, trainer.evaluate()["eval_loss"]


@pytest.fixture
def pristine():
    torch.manual_seed(0)
    return InfiniForCausalLM(InfiniHFConfig(**SHAPE, segment_length=8))


def test_trainer_lowers_the_loss_and_its_folder_is_a_checkpoint(pristine, rows, tmp_path):
    trainer, before, after = fit(pristine, rows, tmp_path, gradient_accumulation_steps=2)
    assert after < 0.7 * before
    assert trainer.predict(rows).predictions.shape == (8, 40, 256)  # the logits, and no cache beside them
    trainer.save_model(tmp_path / "model")
    with torch.no_grad():
        ids = torch.tensor([rows[0]["input_ids"]])
        expected = trainer.model.eval()(ids).logits
        torch.testing.assert_close(infini.load(tmp_path / "model")(ids)[0], expected)


def test_trainer_goes_on_from_its_own_checkpoint(rows, tmp_path):
    def fresh():
        torch.manual_seed(0)
        return InfiniForCausalLM(InfiniHFConfig(**SHAPE, segment_length=8))

    whole, _, _ = fit(fresh(), rows, tmp_path / "whole")
    fit(fresh(), rows, tmp_path / "half", save_strategy="steps", save_steps=4)
    again, _, _ = fit(fresh(), rows, tmp_path / "half", resume_from_checkpoint=str(tmp_path / "half/checkpoint-4"))
    assert again.state.global_step == 8
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(again.model.get_parameter(name), parameter, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings(FUTURE)
def test_lora_trains_adapters_and_gates_alone_and_merges_into_a_checkpoint(make, rows, tmp_path):
    peft = pytest.importorskip("peft")
    base = make(**LONG)
    start = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
    gates = train_gates(model)
    assert {name.split(".")[-1] for name in gates} >= {"beta", "query_scale", "key_bias", "weight"}
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or any(name.endswith(gate) for gate in gates) for name in trainable)
    _, before, after = fit(model, rows, tmp_path, label_names=["labels"])
    assert after < before

    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        expected = model.eval()(ids).logits
        found = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(infini.load(tmp_path / "merged")(ids)[0], expected, atol=1e-4, rtol=1e-4)
    moved = {name for name, parameter in merged.named_parameters() if not torch.equal(parameter, start[name])}
    changed = ("q_proj.weight", "v_proj.weight", "down_proj.weight")
    assert moved == {name for name in start if name.endswith(changed) or name.removeprefix("model.") in gates}

    # The adapter's own file goes on any copy of the base; gates are not in it.
    make(**LONG).save_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter).eval()
    merged_again = again.merge_and_unload()
    for name, parameter in merged_again.named_parameters():
        torch.testing.assert_close(parameter, start[name] if name.removeprefix("model.") in gates else merged.get_parameter(name))
    assert found.shape == (1, 45)

    # Beside it they can be kept, and put back.
    save_gates(model, adapter)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter).eval()
    assert load_gates(again, adapter) == gates
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings(FUTURE)
def test_an_adapter_of_a_write_gate_is_no_gate(make):
    peft = pytest.importorskip("peft")
    own = gates_of(make(**LONG))
    model = peft.get_peft_model(make(**LONG), peft.LoraConfig(r=2, target_modules=["write_gate"]))
    adapters = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert adapters and "write_gate" in adapters[0]
    found = gates_of(model)
    assert len(found) == len(own) and not any("lora_" in name for name in found)


@pytest.fixture
def adapted(make):
    """Makes the same model with an adapter and free gates each time."""
    peft = pytest.importorskip("peft")

    def build():
        base = make(**LONG)
        torch.manual_seed(3)
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        train_gates(model)
        return model

    return build


def trained(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


KEPT = dict(label_names=["labels"], save_strategy="steps", save_steps=4, lr_scheduler_type="constant")


@pytest.mark.filterwarnings(FUTURE)
@pytest.mark.parametrize("restored", [False, True], ids=["", "restore_callback_states_from_checkpoint"])
def test_trainer_goes_on_with_adapter_and_gates_of_its_checkpoint(adapted, rows, tmp_path, restored):
    whole, _, _ = fit(adapted(), rows, tmp_path / "whole", callbacks=[KeepGates()], **KEPT)
    fit(adapted(), rows, tmp_path / "half", callbacks=[KeepGates()], max_steps=4, **KEPT)
    resume = dict(resume_from_checkpoint=str(tmp_path / "half/checkpoint-4"), restore_callback_states_from_checkpoint=restored)
    again, _, _ = fit(adapted(), rows, tmp_path / "half", callbacks=[KeepGates()], **KEPT, **resume)
    assert again.state.global_step == 8
    expected = trained(whole.model)
    for name, parameter in trained(again.model).items():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-5)
    # The checkpoint of the run that went on can be gone on from too, and holds what it ended with.
    fresh = adapted()
    load_gates(fresh, tmp_path / "half/checkpoint-8")
    gates = dict(fresh.named_parameters())
    assert all(torch.equal(gates[name], parameter) for name, parameter in trained(again.model).items() if "lora_" not in name)


@pytest.mark.filterwarnings(FUTURE)
def test_the_best_adapter_has_its_own_gates(adapted, rows, tmp_path):
    best = dict(eval_strategy="steps", eval_steps=4, load_best_model_at_end=True, metric_for_best_model="eval_loss")
    asked = KEPT | best | {"greater_is_better": True}  # the first, because the loss falls
    trainer, _, _ = fit(adapted(), rows, tmp_path, callbacks=[KeepGates()], **asked)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    early, _, _ = fit(adapted(), rows, tmp_path / "early", callbacks=[KeepGates()], max_steps=4, **KEPT)
    expected = trained(early.model)
    for name, parameter in trained(trainer.model).items():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings(FUTURE)
def test_gates_of_another_checkpoint_are_not_gone_on_with(adapted, rows, tmp_path):
    """A trainer may be told of a checkpoint anywhere; in its own folder another run's may have the same number."""
    asked = KEPT | {"max_steps": 4}
    mine, _, _ = fit(adapted(), rows, tmp_path / "mine", callbacks=[KeepGates()], **asked)
    fit(adapted(), rows, tmp_path / "other", callbacks=[KeepGates()], **asked | {"learning_rate": 3e-2})
    elsewhere = asked | {"resume_from_checkpoint": str(tmp_path / "mine/checkpoint-4")}
    for output in ("other", "empty"):
        with pytest.raises(InputError, match=rf"{output}/checkpoint-4 does not hold the gates .* load_gates\(model, CHECKPOINT\)"):
            fit(adapted(), rows, tmp_path / output, callbacks=[KeepGates()], **elsewhere)
    model = adapted()
    load_gates(model, tmp_path / "mine/checkpoint-4")
    again, _, _ = fit(model, rows, tmp_path / "other", callbacks=[KeepGates()], **elsewhere)  # nothing is left to train
    expected = trained(mine.model)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in trained(again.model).items())

    fit(adapted(), rows, tmp_path / "plain", **asked)
    plain = asked | {"resume_from_checkpoint": str(tmp_path / "plain/checkpoint-4")}
    with pytest.raises(InputError, match="the checkpoint of step 4 was saved without KeepGates, and does not say which gates"):
        fit(adapted(), rows, tmp_path / "plain", callbacks=[KeepGates()], **plain)


class Search:
    """A search through two learning rates, as optuna's: trials are objects with a number and values."""

    def ensure_available(self):
        pass

    def run(self, trainer, n_trials, direction):
        found = []
        for number, rate in enumerate((1e-2, 5e-2)):
            trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": rate}))
            found.append({name: gate.clone() for name, gate in gates_of(trainer.model).items()})
            trainer.model_wrapped = trainer.model = None
        return found


class Seen(TrainerCallback):
    """The gates at each save."""

    def __init__(self):
        self.gates = []

    def on_save(self, args, state, control, model=None, **others):
        self.gates.append({name: gate.detach().clone() for name, gate in gates_of(model).items()})


@pytest.mark.filterwarnings(FUTURE)
def test_each_trial_of_a_search_keeps_its_own_gates(adapted, rows, tmp_path, monkeypatch):
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Search)
    monkeypatch.setitem(sys.modules, "optuna", ModuleType("optuna"))
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    best = dict(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss")
    asked = KEPT | best | dict(save_steps=2, max_steps=4, greater_is_better=True)  # the first, because the loss falls
    seen = Seen()
    trainer = trainer_of(adapted, rows, tmp_path, callbacks=[KeepGates(), seen], **asked)
    ended = trainer.hyperparameter_search(lambda trial: trial.params, n_trials=2, backend="optuna")
    kept = [load_file(tmp_path / f"run-{trial}/checkpoint-{step}/gates.safetensors") for trial in (0, 1) for step in (2, 4)]
    for found, expected in zip([*kept, *ended], [*seen.gates, seen.gates[0], seen.gates[2]], strict=True):
        assert found.keys() == expected.keys() and all(torch.equal(found[name], gate) for name, gate in expected.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-0", "run-1"]


@pytest.mark.parametrize("best", [False, True])
def test_the_best_gates_come_back_only_where_the_best_adapter_does(make, tmp_path, best):
    model = make(memory_layers=[0])
    save_gates(model, tmp_path)
    gate = model.model.blocks[0].attention.beta
    with torch.no_grad():
        kept = gate.clone()
        gate.add_(1)
    state = SimpleNamespace(best_model_checkpoint=str(tmp_path))
    KeepGates().on_train_end(SimpleNamespace(load_best_model_at_end=best), state, None, model=model)
    assert torch.equal(gate, kept if best else kept + 1)


def test_gates_that_do_not_fit_are_refused(make, tmp_path):
    with pytest.raises(InputError, match=r"gates.safetensors cannot be read .* written by save_gates"):
        load_gates(make(), tmp_path)
    save_gates(make(memory_layers=[0]), tmp_path)
    with pytest.raises(InputError, match=r"belongs to another model: missing \['blocks.1.attention.beta'\], unexpected \[\]"):
        load_gates(make(), tmp_path)
    save_gates(make(), tmp_path)
    with pytest.raises(InputError, match=r"belongs to another model: missing \[\], unexpected \['blocks.1.attention.beta'\]"):
        load_gates(make(memory_layers=[0]), tmp_path)
    model = make(memory_layers=[0])
    with torch.no_grad():
        model.model.blocks[0].attention.beta[1] = float("nan")
    save_gates(model, tmp_path)
    with pytest.raises(InputError, match="beta holds a NaN"):
        load_gates(make(memory_layers=[0]), tmp_path)
    for shape in ([7], [1, 4]):
        save_file({"blocks.0.attention.beta": torch.zeros(shape)}, tmp_path / "gates.safetensors")
        with pytest.raises(InputError, match=f"belongs to another model: blocks.0.attention.beta is {re.escape(str(shape))}, not .4."):
            load_gates(make(memory_layers=[0]), tmp_path)


def test_gates_of_another_model_are_refused():
    with pytest.raises(InputError, match="holds no InfiniForCausalLM"):
        train_gates(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="no memory in any layer"):
        train_gates(InfiniForCausalLM(InfiniHFConfig(**SHAPE, memory_layers=[])))


def test_more_tokens_can_be_added(make, tmp_path):
    model, ids = make(), torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(260)
        after = model(ids).logits
    torch.testing.assert_close(after[..., :256], before)
    assert model(torch.tensor([[259]])).logits.shape == (1, 1, 260)
    model.save_pretrained(tmp_path)
    assert infini.load(tmp_path).config.vocab_size == 260
