"""States as values: their bytes, their operations, their file."""

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from infini import InfiniConfig, InfiniState, InfiniTransformer, InputError

SHAPE = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
VARIANTS = {
    "paper": {},
    "grouped-delta": {"update_rule": "delta", "num_key_value_heads": 2},
    "deltanet": {"update_rule": "deltanet", "write_gate": True, "num_key_value_heads": 1},
    "dpfp": {"feature_map": "dpfp"},
    "long": {"qk_norm": True, "write_gate": True, "local_attention": "sliding", "window": 9},
    "one-layer": {"memory_layers": (1,), "write_gate": True},
    "no-memory": {"memory_layers": ()},
    "short-conv": {"short_conv": 2, "write_gate": True},
    "twelve-layers": {"num_hidden_layers": 12},
}


def make(variant="long", **changes):
    torch.manual_seed(0)
    model = InfiniTransformer(InfiniConfig(**SHAPE | {"segment_length": 6} | VARIANTS[variant] | changes)).eval()
    for name, parameter in model.named_parameters():
        if "short_conv" in name:  # starts at zero, where its inputs count nothing
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def state():
    with torch.no_grad():
        return make()(torch.randint(20, (3, 16)))[1]


def tensors(state):
    found = {f"{i}.{name}": x for i, layer in enumerate(state.layers) for name, x in layer.tensors().items()}
    return found | {name: getattr(state, name) for name in ("open_length", "tokens_seen", "empty")}


def same(a, b):
    a, b = tensors(a), tensors(b)
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_bytes_are_the_formula(variant, dtype):
    model = make(variant).to(dtype)
    counted = set()
    for tokens in (1, 6, 50):
        _, state = model(torch.randint(20, (2, tokens)))
        counted.add(state.nbytes)
        assert state.nbytes == sum(x.nbytes for x in tensors(state).values()) == model.state_bytes(tokens, 2)
    assert len(counted) == 1
    assert model.init_state(2).nbytes == counted.pop()


def test_bytes_by_hand():
    """Two layers of two memories 4 x 4 + 4 in fp32, five recent keys and values, 17 bytes of counters a row."""
    model = make("grouped-delta")
    assert model.state_bytes(10**6) == 2 * (2 * (4 * 4 + 4) * 4 + 2 * 5 * 2 * 4 * 4) + 17


def test_reset_empties_the_named_rows_whole(state):
    where = torch.tensor([False, True, False])
    found, fresh = tensors(state.reset(where)), tensors(make().init_state(3))
    for name, x in tensors(state).items():
        assert torch.equal(found[name][1], fresh[name][1]), name
        assert torch.equal(found[name][where.logical_not()], x[where.logical_not()]), name
    assert state.tokens_seen.tolist() == [16, 16, 16]


def test_reset_forgets_an_infinite_memory_too(state):
    spoilt = state._map(lambda x: torch.full_like(x, float("inf")))
    clean = spoilt.reset(torch.tensor([True, True, True]))
    assert all(torch.isfinite(x).all() for x in tensors(clean).values())


def test_reset_wants_one_bool_per_row(state):
    for where in (torch.tensor([True]), torch.tensor([1, 0, 1])):
        with pytest.raises(InputError, match=r"must be bool \[3\], one per row"):
            state.reset(where)


def test_clone_shares_nothing_and_select_may_repeat(state):
    copy = state.clone()
    assert same(copy, state)
    shared = {x.data_ptr() for x in tensors(state).values()} & {x.data_ptr() for x in tensors(copy).values()}
    assert not shared
    chosen = tensors(state.select(torch.tensor([2, 2, 0, 1])))
    assert all(torch.equal(chosen[name], x[[2, 2, 0, 1]]) for name, x in tensors(state).items())


def test_detach_cuts_gradients():
    _, state = make()(torch.randint(20, (1, 16)))
    assert state.layers[0].memory.matrix.requires_grad
    assert not any(x.requires_grad for x in tensors(state.detach()).values())
    assert same(state.detach(), state)


def test_saved_and_loaded_bit_for_bit(state, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        kept = state._map(lambda x, dtype=dtype: x.to(dtype))
        kept.save(tmp_path / "state")
        loaded = InfiniState.load(tmp_path / "state")
        assert same(loaded, kept) and loaded.shape == kept.shape
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_every_variant_survives_its_file(variant, tmp_path):
    model = make(variant)
    _, state = model(torch.randint(20, (2, 16)))
    state.save(tmp_path / "state")
    tokens = torch.randint(20, (2, 9))
    assert torch.equal(model(tokens, InfiniState.load(tmp_path / "state"))[0], model(tokens, state)[0])


def test_damaged_files_are_refused(state, tmp_path):
    path = tmp_path / "state"
    with pytest.raises(InputError, match=r"cannot be read as a saved state .*state\.save"):
        InfiniState.load(path)
    state.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read as a saved state"):
        InfiniState.load(path)
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="cannot be read as a saved state"):
        InfiniState.load(path)
    save_file({"a": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(InputError, match="holds 'pt', not 'infini-state-1'"):
        InfiniState.load(path)


def test_a_failed_save_keeps_the_old_file(state, tmp_path, monkeypatch):
    path = tmp_path / "state"
    state.save(path)
    before = path.read_bytes()

    def no_space(tensors, target, metadata):
        target.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("infini.tensor_file.save_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        state.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["state"]
    assert "0.matrix" in load_file(path)


@torch.no_grad()
def test_a_state_of_another_model_batch_or_dtype_is_refused():
    model, tokens = make(), torch.randint(20, (2, 4))
    _, state = model(torch.randint(20, (2, 16)))
    for other in (make(segment_length=7), make("grouped-delta"), make(window=10), make(num_hidden_layers=1), make(short_conv=2)):
        with pytest.raises(InputError, match="the state belongs to another model"):
            other(tokens, state)
    with pytest.raises(InputError, match=r"the state has 2 rows, tokens have 3; use state\.select"):
        model(torch.randint(20, (3, 4)), state)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        with pytest.raises(InputError, match=r"memory is torch\.\w+; this model needs torch\.float32"):
            model(tokens, state._map(lambda x, dtype=dtype: x.to(dtype)))


@pytest.mark.parametrize("lost", ["0.keys", "empty", "1.", "1.matrix", "every", "0.inputs", "0.write_strength", "0.normalizer"])
def test_a_file_that_lost_tensors_is_refused(lost, tmp_path):
    """A layer without its memory, or a convolution without what it looks back at, would begin with an empty one."""
    model = make("short-conv")
    with torch.no_grad():
        _, state = model(torch.randint(20, (2, 16)))
    state.save(tmp_path / "state")
    whole = load_file(tmp_path / "state")
    # What belongs to a memory goes with it.
    gone = {"1.matrix": ("1.matrix", "1.normalizer"), "every": ("0.", "1.")}.get(lost, (lost,))
    save_file({name: x for name, x in whole.items() if not name.startswith(gone)}, tmp_path / "state", {"format": state.format, "shape": state.shape})
    with pytest.raises(InputError, match="is damaged, tensors are missing|has lost layers or memories"):
        model(torch.randint(20, (2, 4)), InfiniState.load(tmp_path / "state"))


def test_files_whose_tensors_do_not_fit_together_are_refused(state, tmp_path):
    state.save(tmp_path / "state")
    whole, metadata = load_file(tmp_path / "state"), {"format": state.format, "shape": state.shape}
    for changes, message in (
        ({"0.matrix": whole["0.matrix"][:1]}, "damaged.*rows differ"),
        ({"tokens_seen": whole["tokens_seen"].float()}, r"damaged.*tokens_seen is torch\.float32"),
    ):
        save_file(whole | changes, tmp_path / "other", metadata)
        with pytest.raises(InputError, match=message):
            InfiniState.load(tmp_path / "other")


def test_select_wants_indices_of_rows(state):
    for rows in (torch.tensor([3]), torch.tensor([-1]), torch.tensor([True, False, True]), torch.tensor([[0]])):
        with pytest.raises(InputError, match="it takes indices of rows, int64 from 0 to 2"):
            state.select(rows)
