"""A compiled training compiles little, early, and computes the same as a plain one."""

import dataclasses
import functools
import json
import logging
import re

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from baselines.full.model import FullTransformer
from baselines.gated_deltanet.model import GatedDeltaNet
from baselines.memorizing.model import MemorizingTransformer
from baselines.rmt.model import RecurrentMemoryTransformer
from baselines.transformer_xl.model import TransformerXL
from infini import InfiniConfig, InfiniTransformer
from infini.data.batch import Batch, Gap
from infini.errors import InputError
from infini.train import TrainSettings, train

pytestmark = pytest.mark.filterwarnings("default")  # torch's compiler warns about itself

N = 8
SHAPE = dict(vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, segment_length=N)
TOLD = r"step (\d+): (\d+) graphs were compiled in \d+\.\d s$"

# Rows, segments, segments of a gap. Some numbers of rows are also those of heads, taps, widths and tokens, which a compiler may
# take one for the other.
SEVERAL = [(4, 1, 0), (8, 3, 0), (2, 2, 1), (16, 2, 9), (5, 3, 40), (2, 5, 0)]
SINGLE = [*SEVERAL[:3], (1, 3, 0), (1, 4, 30), *SEVERAL[3:]]


@dataclasses.dataclass
class Mixed:
    """Batches of the given shapes."""

    shapes: list
    fails_at: int | None = dataclasses.field(default=None, init=False)

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, index):
        if index == self.fails_at:
            raise RuntimeError("the power is cut")
        random = torch.Generator().manual_seed(index)
        rows, segments, gap = self.shapes[index]
        tokens = torch.randint(12, (rows, segments * N + 1), generator=random, dtype=torch.uint8)
        answer = torch.zeros(tokens.shape, dtype=torch.bool)
        answer[:, -3:] = True
        return Batch(tokens, answer, segments, Gap(1, gap, tokens[:, :5]) if gap else None)


@dataclasses.dataclass
class Stream:
    """Two streams in turn, of different rows and lengths; from the third batch on a document begins in one of the first's rows."""

    steps: int = 5

    def __len__(self):
        return self.steps

    def __getitem__(self, index):
        random = torch.Generator().manual_seed(index)
        rows, segments = ((3, 2), (5, 4))[index % 2]
        tokens = torch.randint(12, (rows, segments * N + 1), generator=random, dtype=torch.uint8)
        reset = torch.zeros(tokens.shape, dtype=torch.bool)
        if index in (2, 4):
            reset[1, 1 + index] = True
        return Batch(tokens, torch.zeros_like(reset), segments, stream=index % 2, reset=reset)


@pytest.fixture
def graphs(monkeypatch):
    """Every graph that torch's compiler makes; no code is made of them, which would take minutes."""
    made, run_as_it_is = [], aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward))

    def backend(graph, inputs):
        made.append(graph)
        return run_as_it_is(graph, inputs)

    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # megabytes that pytest would keep
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield made
    torch._dynamo.reset()


def infini(**changes):
    torch.manual_seed(0)
    return InfiniTransformer(InfiniConfig.long(**SHAPE, initializer_range=0.3, **changes))


def run(model, source, folder, **changes):
    """The numbers of a training that do not depend on the clock."""
    settings = dict(steps=len(source), warmup_steps=2, device="cpu", precision="fp32", workers=0, log_every=1, checkpoint_every=3)
    # So slowly that rounding does not grow from step to step.
    train(model, source, TrainSettings(**settings | dict(learning_rate=1e-6) | changes), folder)
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row.get("loss", row.get("knockout_token_loss")) for row in rows]


@pytest.mark.parametrize(
    ("model", "changes", "rounding"),
    [
        (dict(short_conv=4), dict(gap_read_segments=8, precision="bf16", recompute=True), 5e-3),
        (dict(update_rule="delta", local_attention="segment", num_key_value_heads=1), {}, 1e-5),
    ],
    ids=["conv-bf16", "grouped"],
)
def test_a_whole_training_compiles_its_parts_in_the_first_step_and_no_more(model, changes, rounding, graphs, tmp_path, caplog):
    caplog.set_level("INFO", logger="infini.train")
    plain = run(infini(**model), Mixed(SEVERAL), tmp_path / "plain", **changes)
    assert not graphs
    compiled = run(infini(**model), Mixed(SEVERAL), tmp_path / "compiled", compile=True, **changes)
    # Before attention, rotary positions (of keys once more, where they have heads of their own), after attention, losses.
    parts = 4 + ("num_key_value_heads" in model)
    assert len(graphs) == 2 * parts  # with gradient and without
    steps = [int(found[1]) for message in caplog.messages if (found := re.match(TOLD, message))]
    assert steps == [1, 1]
    assert compiled == pytest.approx(plain, rel=rounding, abs=rounding)


def test_one_row_is_told_when_it_comes_and_going_on_compiles_nothing(graphs, tmp_path, caplog):
    caplog.set_level("INFO", logger="infini.train")
    source, model = Mixed(SINGLE), infini(short_conv=2)
    source.fails_at = 6
    with pytest.raises(RuntimeError, match="power"):
        run(model, source, tmp_path / "compiled", compile=True)
    source.fails_at = None
    compiled = run(infini(short_conv=2), source, tmp_path / "compiled", compile=True)
    assert len(graphs) == 12  # what is after attention sees all tokens in one row
    steps = [int(found[1]) for message in caplog.messages if (found := re.match(TOLD, message))]
    assert steps == [1, 1, 4, 5]
    assert compiled == pytest.approx(run(infini(short_conv=2), source, tmp_path / "plain"), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        # Rows that differ have a table of positions each, and a document that begins among them parts the convolution.
        ({}, 12),
        # A group's inputs get a gradient, and those of the first have none.
        (dict(replay_segments=1), 13),
    ],
    ids=["parallel", "replay"],
)
def test_streams_compile_little(changes, most, graphs, tmp_path):
    plain = run(infini(short_conv=2), Stream(), tmp_path / "plain", **changes)
    compiled = run(infini(short_conv=2), Stream(), tmp_path / "compiled", compile=True, **changes)
    assert len(graphs) <= most
    assert compiled == pytest.approx(plain, rel=1e-5, abs=1e-5)


# Graphs of the first step, half of them without gradient, and of those in which a document begins: there rows have tables of
# positions each, and it parts the convolution.
BASELINES = {
    "transformer_xl": (TransformerXL, {}, 6, 0),
    # The first layer's end reads embeddings, the others' what an end gave.
    "transformer_xl_post_norm": (TransformerXL, {"norm": "post"}, 8, 0),
    # The layer with the memory has projections of its own, and weighs what is retrieved; around documents some of it is hidden.
    "memorizing": (MemorizingTransformer, {"memory_size": 4 * N, "top_k": 3}, 12, 6),
    "sliding": (FullTransformer, {"window": N}, 6, 2),
    "rmt": (RecurrentMemoryTransformer, {"num_memory_tokens": 2}, 6, 0),
    # Layers of two kinds; the recurrent one has a part behind its recurrence too.
    "gated_deltanet": (GatedDeltaNet, {}, 10, 4),
}


@pytest.mark.parametrize("name", BASELINES)
def test_every_model_compiles_what_stands_around_its_attention(name, graphs, tmp_path, caplog):
    caplog.set_level("INFO", logger="infini.train")
    model_class, options, first, with_documents = BASELINES[name]

    def build():
        torch.manual_seed(0)
        return model_class(model_class.config_class(**SHAPE, **options, initializer_range=0.3))

    plain = run(build(), Stream(), tmp_path / "plain")
    compiled = run(build(), Stream(), tmp_path / "compiled", compile=True)
    told = [(int(found[1]), int(found[2])) for message in caplog.messages if (found := re.match(TOLD, message))]
    assert sum(count for step, count in told if step == 1) == first
    assert sum(count for step, count in told if step in (3, 5)) == with_documents
    assert len(graphs) == first + with_documents
    assert compiled == pytest.approx(plain, rel=1e-5, abs=1e-5)


def test_a_machine_without_a_compiler_is_told(tmp_path, monkeypatch):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # nothing that was compiled before
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        torch._dynamo.reset()
        with pytest.raises(InputError, match=r"compile is true, but torch's compiler fails here \(.*no-such-compiler.*train\.compile=false"):
            run(infini(), Mixed(SEVERAL), tmp_path / "run", compile=True)
