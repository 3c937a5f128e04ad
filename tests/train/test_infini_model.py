"""The loop around the real model."""

import warnings

import pytest
import torch

from infini import InfiniConfig, InfiniTransformer
from infini.data.batch import Batch
from infini.train import train
from infini.train.loop import _in_precision
from infini.train.loss import loss_of
from infini.train.optimizer import build_optimizer
from infini.train.step import take_step

PRESETS = {"paper": InfiniConfig.paper, "long": InfiniConfig.long}


@pytest.fixture(params=PRESETS)
def infini_model(request):
    def build(seed=0):
        torch.manual_seed(seed)
        config = PRESETS[request.param](
            vocab_size=12,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            segment_length=4,
        )
        return InfiniTransformer(config)

    return build


def test_under_autocast_parameters_gradients_and_state_stay_fp32(infini_model, copy_source):
    model, batch = infini_model(), copy_source()[0].to("cpu")
    call = _in_precision(model, torch.device("cpu"), "bf16")
    logits, state = call(batch.tokens[:, :-1])
    assert logits.dtype == torch.bfloat16
    memories = [layer.memory for layer in state.layers]
    assert {tensor.dtype for memory in memories for tensor in memory} == {torch.float32}
    sum(loss_of(call, batch)).backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert _in_precision(model, torch.device("cpu"), "fp32")(batch.tokens[:, :-1])[0].dtype == torch.float32


def test_it_learns_one_batch_by_heart_with_the_gates_moving(infini_model, copy_source, settings, tmp_path):
    model = infini_model()
    s = settings(steps=120, warmup_steps=5, learning_rate=0.02, weight_decay=0.0, log_every=40)
    metrics = train(model, copy_source(steps=120, fixed=True), s, tmp_path)
    assert metrics["loss"] < 0.2
    assert all((block.attention.beta.detach().abs() > 0.05).all() for block in model.blocks)
    assert metrics["knockout_token_loss"] > 0.05  # what was learned is partly in the memory


def test_stopped_and_resumed_it_has_the_same_bits(infini_model, copy_source, settings, tmp_path):
    s = settings(precision="bf16", checkpoint_every=3)
    whole = infini_model()
    train(whole, copy_source(), s, tmp_path / "whole")

    class Stop(type(copy_source())):
        def __getitem__(self, index):
            if index == 5:
                raise RuntimeError("power cut")
            return super().__getitem__(index)

    Stop.__module__, Stop.__qualname__ = copy_source.__module__, copy_source.__qualname__
    with pytest.raises(RuntimeError, match="power cut"):
        train(infini_model(), Stop(), s, tmp_path / "halves")
    resumed = infini_model(seed=5)
    train(resumed, copy_source(), s, tmp_path / "halves")
    expected = whole.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in resumed.state_dict().items())


def test_a_gate_that_a_single_segment_does_not_use_is_no_fault(
    infini_model, copy_source, settings, tmp_path, caplog
):
    class OneSegment:
        def __getitem__(self, index):
            batch = copy_source()[index]
            return Batch(batch.tokens[:, :5], batch.answer[:, :5], segments=1)

    train(infini_model(), OneSegment(), settings(), tmp_path)
    assert not caplog.records


def test_the_final_folder_loads(infini_model, copy_source, settings, tmp_path):
    model = infini_model()
    train(model, copy_source(), settings(), tmp_path)
    loaded = InfiniTransformer.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    weight = model.blocks[0].attention.q_proj.weight
    assert torch.equal(loaded.blocks[0].attention.q_proj.weight, weight.half().float())


def test_recomputation_changes_no_gradient(infini_model, copy_source):
    gradients = []
    for recompute in (False, True):
        model = infini_model()
        model.enable_recompute(recompute)
        sum(loss_of(model, copy_source()[0].to("cpu"))).backward()
        gradients.append([p.grad for p in model.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed)


def test_its_gates_learn_faster_and_nothing_of_the_memory_decays(infini_model, settings):
    model = infini_model()
    optimizer = build_optimizer(model, settings())
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = group_of[id(parameter)]
        of_memory = any(part in name for part in ("beta", "write_gate", "query_", "key_"))
        assert group["scale"] == (5.0 if of_memory else 1.0), name
        assert (group["weight_decay"] > 0) == (parameter.dim() > 1 and not of_memory), name


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_step_never_makes_the_host_wait(infini_model, copy_source, settings, precision):
    cuda = torch.device("cuda")
    model = infini_model().to(cuda)
    optimizer = build_optimizer(model, settings())
    call = _in_precision(model, cuda, precision)
    batches = [copy_source()[0].pin_memory()]
    take_step(call, optimizer, batches, 1.0, cuda)  # the first allocates and picks kernels
    try:
        with warnings.catch_warnings(action="ignore"):  # it warns that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        take_step(call, optimizer, batches, 1.0, cuda)
    finally:
        torch.cuda.set_sync_debug_mode("default")
