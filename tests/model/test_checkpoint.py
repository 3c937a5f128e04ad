"""Checkpoint folders: what goes in comes out, and what is damaged says so."""

import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import infini
from infini import InfiniConfig, InfiniTransformer, InputError
from infini.checkpoint import resolve

SHAPE = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def make(**changes):
    torch.manual_seed(0)
    return InfiniTransformer(InfiniConfig(**SHAPE | {"segment_length": 6} | changes)).eval()


@pytest.fixture
def folder(tmp_path):
    make(write_gate=True, qk_norm=True, memory_layers=(0,)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@torch.no_grad()
def test_what_goes_in_comes_out(tied, tmp_path):
    model = make(tie_word_embeddings=tied, update_rule="deltanet", write_gate=True, local_attention="sliding", window=9)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = infini.load(tmp_path)
    tokens = torch.randint(20, (2, 15))
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    assert (loaded.head.weight is loaded.embedding.weight) is tied
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@torch.no_grad()
def test_matrices_in_16_bit_vectors_as_they_are(tmp_path):
    model = make(write_gate=True, qk_norm=True)
    model.save_pretrained(tmp_path, dtype=torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["blocks.0.attention.q_proj.weight"].dtype == torch.float16
    scales = ("query_scale", "query_bias", "key_scale", "key_bias")
    for name in ("attention.beta", "attention.write_gate.weight", "mlp_norm.weight", *(f"attention.{scale}" for scale in scales)):
        assert stored[f"blocks.0.{name}"].dtype == torch.float32, name
    loaded = InfiniTransformer.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert {p.dtype for p in infini.load(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    tokens = torch.randint(20, (2, 15))
    assert torch.allclose(loaded(tokens)[0], model(tokens)[0], atol=1e-2)


def test_a_dtype_that_spoils_weights_is_refused(tmp_path):
    model = make()
    with pytest.raises(InputError, match=r"dtype is torch\.int8; weights can be saved in floats only"):
        model.save_pretrained(tmp_path, dtype=torch.int8)  # which would write zeros
    with torch.no_grad():
        model.blocks[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(InputError, match=r"blocks\.0\.mlp\.up_proj\.weight has numbers too large for torch\.float16"):
        model.save_pretrained(tmp_path, dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(dtype=torch.int8), r"dtype is torch\.int8; parameters are one of torch\.float32, torch\.bfloat16, "),
        (dict(dtype="bfloat16"), "dtype is 'bfloat16'; parameters are one of"),
        (dict(device="cuda:99"), r"device is 'cuda:99', but there are \d+ CUDA devices: use device=cpu"),
        (dict(device="cuda:first"), "device is 'cuda:first', which names none: use cpu, cuda or cuda:N"),
        (dict(device="vulkan"), "device is 'vulkan', which is not here: use cpu"),
        (dict(attention="misspelt"), "attention is 'misspelt'; choose one of auto, .*sdpa, eager"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_said_before_weights_are_read(folder, options, sentence, monkeypatch):
    monkeypatch.setattr("infini.checkpoint.read_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=sentence):
        infini.load(folder, **options)


def test_a_memory_backend_that_there_is_not():
    with pytest.raises(InputError, match="memory_backend is 'cuda'; choose one of auto, triton, torch"):
        InfiniTransformer(InfiniConfig(**SHAPE), memory_backend="cuda")


def refused(folder, message):
    with pytest.raises(InputError, match=message) as caught:
        infini.load(folder)
    assert "\n" not in str(caught.value).strip()


def test_names_are_those_of_shipped_models_unless_there_is_such_a_folder(tmp_path, monkeypatch):
    for name in ("b", "a"):
        make().save_pretrained(tmp_path / "shipped" / name)
    monkeypatch.setattr("infini.checkpoint.SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    assert resolve(None) == tmp_path / "shipped" / "a" and resolve("b") == tmp_path / "shipped" / "b"
    (tmp_path / "b").mkdir()
    assert resolve("b").absolute() == tmp_path / "b"


def test_missing(tmp_path, folder):
    refused(tmp_path / "nowhere", r"there is no checkpoint folder '.*nowhere'; shipped models are")
    refused(tmp_path, r"is no checkpoint: it has no config\.json")
    (folder / "model.safetensors").unlink()
    refused(folder, r"has no model\.safetensors")


def test_a_pickle_is_not_loaded(folder, monkeypatch):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was opened"))
    refused(folder, r"\['pytorch_model\.bin'\] may be pickles, which are not loaded: convert them to safetensors")


def test_truncated(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 200, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(folder, "cannot be read .*cut short or no safetensors file: copy it again")
    (folder / "config.json").write_text('{"model_type": "inf')
    refused(folder, "is not JSON .*damaged")
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(folder, "is not JSON")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32, "head_dim": 8}, r"another configuration: .* is \[16, 16\], config\.json asks for \[16, 32\]"),
        ({"num_hidden_layers": 3}, r"another configuration: missing \['blocks\.2"),
        ({"write_gate": False}, r"another configuration: missing \[\], unexpected .*write_gate"),
        ({"colour": "red"}, r"unknown fields \['colour'\]; known are"),
        ({"update_rule": "hebb"}, "update_rule is 'hebb'; it must be one of linear, delta"),
        ({"gate_when_empty": "false"}, "gate_when_empty is 'false'; it must be true or false"),
        ({"model_type": "llama"}, "is of another model: model_type is 'llama', not 'infini'; load it with the class of that model"),
        ({"format": None}, "has format None; this version reads 'infini-1'"),
        ({"format": "infini-9"}, "has format 'infini-9'; this version reads 'infini-1'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_of_another_configuration(folder, changes, message):
    change_config(folder, **changes)
    refused(folder, message)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(folder, bad):
    weights = load_file(folder / "model.safetensors")
    weights["blocks.1.mlp.up_proj.weight"][3, 5] = bad
    save_file(weights, folder / "model.safetensors")
    refused(folder, r"blocks\.1\.mlp\.up_proj\.weight holds a NaN or an infinity")


def test_a_failed_save_keeps_the_old_weights(folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def no_space(tensors, target, metadata):
        target.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("infini.tensor_file.save_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        make(write_gate=True, qk_norm=True, memory_layers=(0,)).save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
