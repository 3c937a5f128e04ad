"""Bytes as a tokenizer of transformers."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD = "\x00"


class InfiniByteTokenizer(PreTrainedTokenizerFast):
    """UTF-8 bytes as tokens 0 to 255, as :class:`infini.data.tokenizer.ByteTokenizer`; batches are padded on the left.

    It needs no files: `AutoTokenizer.from_pretrained` builds it for every checkpoint of this library. Byte 0, which no text
    holds, is the padding, and the end of a text for tools that want one.

    Example:
        >>> tokenizer = InfiniByteTokenizer()
        >>> tokenizer(["naïve", "a"], padding=True).input_ids
        [[110, 97, 195, 175, 118, 101], [0, 0, 0, 0, 0, 97]]
        >>> tokenizer.decode([110, 97, 195, 175, 118, 101])
        'naïve'
    """

    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, **kwargs):
        kwargs.pop("tokenizer_file", None)  # nothing in it that is not here
        kwargs["tokenizer_object"] = _byte_level()
        defaults = {"pad_token": PAD, "bos_token": None, "eos_token": PAD, "padding_side": "left"}
        super().__init__(**defaults | {"clean_up_tokenization_spaces": False} | kwargs)


def _byte_level() -> Tokenizer:
    # Byte-level BPE without merges writes each byte as a printable letter; here its number is the byte itself.
    letters = {byte: letter for byte, letter in _letters().items()} | {0: PAD}
    tokenizer = Tokenizer(models.BPE({letter: byte for byte, letter in letters.items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _letters() -> dict[int, str]:
    """The letter that byte-level tokenizers write for each byte: itself if it is printable, else one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
