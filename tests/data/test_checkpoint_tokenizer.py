"""A checkpoint folder carries its tokenizer, wherever it goes, and no other will do."""

import json
import shutil

import pytest
import torch

import infini
from baselines.transformer_xl.config import TransformerXLConfig
from baselines.transformer_xl.model import TransformerXL
from infini import InfiniConfig, InfiniTransformer
from infini.data.bpe import BPETokenizer, train_bpe
from infini.data.tokenizer import load_tokenizer
from infini.errors import InputError

SIZE = 270
SHAPE = {"vocab_size": SIZE, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "segment_length": 8}
TEXT = "The whale said: 42, naïve. "


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    (folder / "tokenizer.json").write_bytes(train_bpe(["the white whale and the old man and the sea and the ship " * 9], SIZE))
    return folder


@pytest.fixture
def checkpoint(learned, tmp_path):
    InfiniTransformer(InfiniConfig(**SHAPE, tokenizer=str(learned))).save_pretrained(tmp_path / "one")
    return tmp_path / "one"


def test_a_folder_that_was_moved_and_saved_again_still_knows_its_tokenizer(learned, checkpoint, tmp_path):
    expected = BPETokenizer(learned / "tokenizer.json").encode(TEXT)
    assert json.loads((checkpoint / "config.json").read_text())["tokenizer"] == "tokenizer.json"
    moved = tmp_path / "elsewhere"
    checkpoint.rename(moved)
    model = infini.load(moved)
    model.save_pretrained(moved)  # over itself
    model.save_pretrained(tmp_path / "two")
    shutil.rmtree(moved)
    assert load_tokenizer(infini.load(tmp_path / "two").config).encode(TEXT) == expected


def test_a_baseline_has_it_too(learned, tmp_path):
    TransformerXL(TransformerXLConfig(**SHAPE, tokenizer=str(learned / "tokenizer.json"))).save_pretrained(tmp_path)
    config = TransformerXL.from_pretrained(tmp_path).config
    assert load_tokenizer(config).decode(load_tokenizer(config).encode(TEXT)) == TEXT


def test_another_tokenizer_in_its_place_is_found_out(checkpoint):
    # Of the same size: only what it says is different.
    (checkpoint / "tokenizer.json").write_bytes(train_bpe(["another text with other words, other words in another text " * 9], SIZE))
    with pytest.raises(InputError, match="another tokenizer than the one that model.safetensors was trained with"):
        infini.load(checkpoint)


def test_what_decides_its_tokens_is_compared_and_not_how_the_file_is_laid_out(checkpoint):
    path = checkpoint / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(content | {"truncation": None, "note": "written again"}, indent=7))
    infini.load(checkpoint)
    path.write_text(json.dumps(content | {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}}))
    with pytest.raises(InputError, match="another tokenizer than the one"):
        infini.load(checkpoint)


def test_a_model_that_is_saved_over_another_brings_its_own(checkpoint, tmp_path):
    (tmp_path / "other.json").write_bytes(train_bpe(["another text with other words, other words in another text " * 9], SIZE))
    config = InfiniConfig(**SHAPE, tokenizer=str(tmp_path / "other.json"))
    InfiniTransformer(config).save_pretrained(checkpoint)
    assert load_tokenizer(infini.load(checkpoint).config).encode(TEXT) == load_tokenizer(config).encode(TEXT)


def test_a_missing_one_is_said(checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer.json is missing.*copy the whole folder"):
        infini.load(checkpoint)


@pytest.mark.parametrize("name", ["/etc/hostname", "../tokenizer.json", "sentencepiece"])
def test_a_configuration_reaches_no_file_outside_its_folder(checkpoint, name):
    fields = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(fields | {"tokenizer": name}))
    with pytest.raises(InputError, match="this version knows 'bytes' and 'tokenizer.json', in the same folder"):
        infini.load(checkpoint)


def test_another_vocabulary_is_refused(learned):
    with pytest.raises(InputError, match="has 270 entries, the model's vocabulary 256.*model.vocab_size=270"):
        load_tokenizer(InfiniConfig(tokenizer=str(learned)))
    with pytest.raises(InputError, match="there is no such file.*infini tokenizer"):
        load_tokenizer(InfiniConfig(tokenizer="nowhere/tokenizer.json"))


def test_transformers_finds_the_same_tokenizer(checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    import infini.hf  # noqa: F401

    own = load_tokenizer(infini.load(checkpoint).config)
    found = transformers.AutoTokenizer.from_pretrained(checkpoint)
    assert found(TEXT).input_ids == own.encode(TEXT) and found.decode(own.encode(TEXT)) == TEXT and len(found) == SIZE
    padded = found([TEXT, "sea"], padding=True)
    assert padded.input_ids[1][0] == 0 and padded.attention_mask[1][0] == 0
    # Written by transformers, the folder opens here.
    transformers.AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "saved")
    found.save_pretrained(tmp_path / "saved")
    model = infini.load(tmp_path / "saved")
    assert load_tokenizer(model.config).encode(TEXT) == own.encode(TEXT)
    assert torch.equal(model.embedding.weight, infini.load(checkpoint).embedding.weight)


def test_lm_eval_reads_with_it(checkpoint):
    pytest.importorskip("lm_eval")
    from infini.evaluate import InfiniLM

    lm = InfiniLM(pretrained=str(checkpoint), device="cpu")
    assert lm.tok_encode(TEXT, False) == load_tokenizer(lm.model.config).encode(TEXT)


def test_a_path_is_no_name_inside_a_folder_of_transformers_either(learned, tmp_path):
    pytest.importorskip("transformers")
    from infini.hf import InfiniForCausalLM, InfiniHFConfig

    InfiniForCausalLM(InfiniHFConfig(**SHAPE, tokenizer=str(learned / "tokenizer.json"))).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tokenizer"] == "tokenizer.json"


def test_transformers_takes_it_from_the_folder_and_leaves_it_in_the_next(checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from infini.hf import InfiniForCausalLM

    other = train_bpe(["another text with other words, other words in another text " * 9], SIZE)
    (tmp_path / "tokenizer.json").write_bytes(other)
    monkeypatch.chdir(tmp_path)  # where a file of the same name lies
    expected = load_tokenizer(infini.load(checkpoint).config).encode(TEXT)
    model = InfiniForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "two")
    model.model.save_pretrained(tmp_path / "three")
    for folder in ("two", "three"):
        assert load_tokenizer(infini.load(tmp_path / folder).config).encode(TEXT) == expected
    (checkpoint / "tokenizer.json").write_bytes(other)
    with pytest.raises(InputError, match="another tokenizer than the one that model.safetensors was trained with"):
        InfiniForCausalLM.from_pretrained(checkpoint)
