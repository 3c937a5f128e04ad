"""One folder for `infini train`, `infini.load` and the Auto classes."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import infini
import infini.hf
from infini.checkpoint import SHIPPED
from infini.config import InfiniConfig
from infini.errors import InputError
from infini.hf import InfiniForCausalLM, InfiniHFConfig
from tests.hf.conftest import LONG


def weights_of(model):
    return {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}


def same(one, other):
    one, other = weights_of(one), weights_of(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_fields_and_defaults_are_those_of_infini_config():
    ours = InfiniConfig()
    assert InfiniHFConfig().infini == ours
    assert {name: getattr(InfiniHFConfig(), name) for name in ours.to_dict()} == ours.to_dict()


def test_the_shipped_model_loads_by_the_auto_classes():
    auto = AutoModelForCausalLM.from_pretrained(SHIPPED / "passkey-mixed-12m")
    assert isinstance(auto, InfiniForCausalLM) and not auto.training
    assert auto.dtype == torch.float32  # as infini.load; the file holds float16
    assert same(auto, infini.load("passkey-mixed-12m"))
    half = AutoModelForCausalLM.from_pretrained(SHIPPED / "passkey-mixed-12m", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("shard", ["50GB", "30KB"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "memory_layers": [1]} | LONG], ids=["tied", "untied"])
def test_a_saved_folder_opens_on_both_sides(make, tmp_path, shard, changes):
    model = make(**changes)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "30KB")
    assert same(infini.load(tmp_path), model)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    assert infini.load(tmp_path).config == model.config.infini == AutoConfig.from_pretrained(tmp_path).infini
    # And the way back: a folder of the library's own writer, over the old one.
    infini.load(tmp_path).save_pretrained(tmp_path / "own")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "own"), model)


def test_config_json_is_the_librarys_own_and_whole(model, tmp_path):
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.items() >= {"model_type": "infini", "format": "infini-1", **model.config.infini.to_dict()}.items()


def test_a_loaded_model_is_saved_again_as_it_was(model, tmp_path):
    model.save_pretrained(tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert same(infini.load(tmp_path / "two"), model)


def test_the_tokenizer_needs_no_files_and_comes_back_from_them(model, tmp_path):
    model.save_pretrained(tmp_path)
    built = AutoTokenizer.from_pretrained(tmp_path)
    built.save_pretrained(tmp_path)
    text = "naïve Ā €\n\t\x7f 48213 \U0001f600"
    for tokenizer in (built, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer(text).input_ids == list(text.encode()) and tokenizer.decode(list(text.encode())) == text
        assert tokenizer.padding_side == "left" and len(tokenizer) == 256


def test_every_byte_is_its_own_token():
    tokenizer = infini.hf.InfiniByteTokenizer()
    text = "".join(map(chr, range(256))) + "\u0100\u0143\uffff"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ({"format": "infini-2"}, "has format 'infini-2'; this version reads 'infini-1'"),
        ({"segment_lenght": 4}, "unknown fields \\['segment_lenght'\\]"),
        ({"segment_length": 0}, "segment_length is 0; it must be at least 1"),
        ({"num_hidden_layers": 3}, "missing \\['model.blocks.2"),
        ({"num_hidden_layers": 1}, "unexpected \\['blocks.1"),
    ],
)
def test_a_wrong_configuration_is_refused(model, tmp_path, broken, sentence):
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | broken))
    with pytest.raises(InputError, match=sentence):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(InputError):
        infini.load(tmp_path)


def test_a_folder_that_is_no_checkpoint_is_said_to_be_none(model, tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises((OSError, ValueError), match="config.json|model_type"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="is no checkpoint"):
        infini.load(tmp_path)


def test_weights_that_are_not_numbers_are_refused(model, tmp_path):
    with torch.no_grad():
        model.model.blocks[0].attention.beta[0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="beta holds a NaN"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_missing_shard_and_a_strange_index_are_named(model, tmp_path):
    model.save_pretrained(tmp_path / "whole", max_shard_size="30KB")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    first = sorted((tmp_path / "part").glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(InputError, match=f"{first.name} is missing"):
        infini.load(tmp_path / "part")
    index = tmp_path / "whole" / "model.safetensors.index.json"
    for text, sentence in (("{", "no index of shards"), ('{"weight_map": {"a": "../x.safetensors"}}', "in the same folder")):
        index.write_text(text)
        with pytest.raises(InputError, match=sentence):
            infini.load(tmp_path / "whole")


def test_a_backend_of_attention_can_be_asked_for(model, tmp_path):
    model.save_pretrained(tmp_path)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert (eager.model.attention_backend, model.model.attention_backend) == ("eager", "auto")
    with pytest.raises((InputError, ValueError, ImportError)):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flex_attention")


def test_parameters_are_float32_unless_asked_otherwise(model, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == infini.load(tmp_path).embedding.weight.dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert InfiniForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).dtype == torch.bfloat16  # the older name
