import pytest

from infini.config import InfiniConfig
from infini.data.tokenizer import ByteTokenizer, load_tokenizer
from infini.errors import InputError


@pytest.mark.parametrize("text", ["", "pass key", "\x00\n\t", "Überraschung, 鍵, 🔑"])
def test_any_text_comes_back(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_ids_are_bytes_and_all_of_them_are_in_the_vocabulary():
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 256
    assert max(tokenizer.encode("\N{MUSICAL SYMBOL G CLEF}ÿ")) < 256


def test_a_model_may_cut_a_character_in_half():
    assert ByteTokenizer().decode([104, 0xC3]).startswith("h")


def test_the_configuration_names_the_tokenizer():
    assert isinstance(load_tokenizer(InfiniConfig()), ByteTokenizer)
    with pytest.raises(InputError, match="'sentencepiece'; this version knows 'bytes'"):
        load_tokenizer(InfiniConfig(tokenizer="sentencepiece"))
