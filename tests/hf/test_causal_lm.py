import sys

import pytest
import torch
from infini.tasks.passkey.benchmark import PasskeyBenchmark, run

from infini.errors import InputError
from infini.hf.causal_lm import HuggingFaceCausalLM, load_causal_lm
from infini.session import StreamingSession

transformers = pytest.importorskip("transformers")


def byte_tokenizer(begin=True):
    """A byte-level tokenizer without merges: 256 bytes and <s>, which goes before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*alphabet, "<s>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def llama(**changes):
    torch.manual_seed(0)
    settings = dict(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes)).eval()


def mistral():
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
        initializer_range=0.3,
    )
    return transformers.MistralForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture
def tokens():
    return torch.randint(257, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", [llama, mistral, gpt2])
@torch.no_grad()
def test_pieces_give_the_logits_of_one_call(make, tokens):
    stock = make()
    model, expected = HuggingFaceCausalLM(stock), stock(tokens).logits
    state, found = None, []
    for start, end in ((0, 1), (1, 18), (18, 40)):
        logits, state = model(tokens[:, start:end], state)
        found.append(logits)
        assert state.nbytes == model.state_bytes(end, batch_size=2)
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-4, rtol=1e-4)
    assert state.tokens_seen.tolist() == [40, 40]


@pytest.mark.parametrize("make", [llama, mistral])
@torch.no_grad()
def test_a_state_is_a_value(make, tokens):
    model = HuggingFaceCausalLM(make())
    _, state = model(tokens[:, :20])
    nbytes = state.nbytes
    first, _ = model(tokens[:, 20:], state)
    second, _ = model(tokens[:, 20:], state)
    assert torch.equal(first, second)
    assert state.nbytes == nbytes and state.tokens_seen.tolist() == [20, 20]


@torch.no_grad()
def test_padding_anywhere_leaves_each_row_as_it_is_alone(tokens):
    model = HuggingFaceCausalLM(llama())
    # Row 0: padding on the left, in the middle and on the right; row 1: none.
    padding = torch.zeros(2, 40, dtype=torch.bool)
    padding[0, :3] = padding[0, 10:12] = padding[0, 35:] = True
    alone, _ = model(tokens[:1][~padding[:1]][None], keep="last")
    _, state = model(tokens[:, :8], padding=padding[:, :8])
    together, state = model(tokens[:, 8:], state, padding=padding[:, 8:], keep="last")
    torch.testing.assert_close(together[0], alone[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[1], model(tokens[1:], keep="last")[0][0], atol=1e-4, rtol=1e-4)
    assert state.tokens_seen.tolist() == [30, 40]


@torch.no_grad()
def test_keep_and_hidden_choose_what_comes_back(tokens):
    stock = llama()
    model = HuggingFaceCausalLM(stock)
    everything, _ = model(tokens)
    assert torch.allclose(model(tokens, keep="last")[0], everything[:, -1:], atol=1e-5)
    assert model(tokens, keep="none")[0] is None
    states, _ = model(tokens, hidden=True)
    assert torch.allclose(stock.lm_head(states), everything, atol=1e-5)
    with pytest.raises(InputError, match="keep is 'first'"):
        model(tokens, keep="first")


@torch.no_grad()
def test_a_reset_row_has_forgotten_and_the_other_has_not(tokens):
    model = HuggingFaceCausalLM(llama())
    _, state = model(tokens[:, :20])
    anew, _ = model(tokens[:, 20:], state.reset(torch.tensor([True, False])), keep="last")
    by_flag = torch.zeros(2, 20, dtype=torch.bool)
    by_flag[0, 0] = True
    flagged, _ = model(tokens[:, 20:], state, reset=by_flag, keep="last")
    fresh, _ = model(tokens[:1, 20:], keep="last")
    whole, _ = model(tokens[1:], keep="last")
    for logits in (anew, flagged):
        torch.testing.assert_close(logits[0], fresh[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits[1], whole[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="middle of a piece"):
        model(tokens[:, 20:], state, reset=by_flag.roll(3, dims=1))


@torch.no_grad()
def test_rows_of_a_state_can_be_taken_and_copied(tokens):
    model = HuggingFaceCausalLM(llama())
    _, state = model(tokens[:, :20])
    swapped, _ = model(tokens[:, 20:].flip(0), state.select(torch.tensor([1, 0])).clone(), keep="last")
    straight, _ = model(tokens[:, 20:], state.detach().to("cpu"), keep="last")
    torch.testing.assert_close(swapped.flip(0), straight)
    with pytest.raises(InputError, match="state has 2 rows, tokens have 1"):
        model(tokens[:1, 20:], state)
    copied, kept = state.clone(), state.cache.layers[0].keys.clone()
    copied.cache.layers[0].keys.zero_()
    assert torch.equal(state.cache.layers[0].keys, kept)  # a clone shares nothing


@torch.no_grad()
def test_a_session_writes_what_generate_writes(tokens):
    stock = llama()
    session = StreamingSession(HuggingFaceCausalLM(stock), batch_size=2, piece=7)
    session.feed(tokens)
    ours = torch.stack(list(session.generate(8)), 1)
    # Not the stock generate(): its special tokens end it early. Greedy by full recomputation.
    text = tokens
    for _ in range(8):
        text = torch.cat([text, stock(text).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(ours, text[:, 40:])


def test_a_folder_runs_the_passkey_benchmark(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    model, tokenizer = load_causal_lm(tmp_path / "model")
    assert tokenizer.prefix_ids == [256] and tokenizer.vocab_size == 257
    assert tokenizer.decode([256, *tokenizer.encode(" 12345. é")]) == " 12345. é"
    settings = PasskeyBenchmark(lengths=(300, 400), depths=(0.5,), samples=2, batch_size=2)
    rows = run(model, tokenizer, settings, tmp_path / "out")
    # Nothing is learned, so nothing is found; the cache grows with the text, by the formula.
    assert [row["exact_match"] for row in rows] == [0.0, 0.0]
    assert [row["state_bytes"] for row in rows] == [model.state_bytes(310), model.state_bytes(410)]
    assert model.state_bytes(300) == 2 * 2 * 2 * 8 * 4 * 300


def test_a_tokenizer_without_a_first_token_has_no_prefix():
    from infini.hf.tokenizer import HuggingFaceTokenizer

    stock = byte_tokenizer(begin=False)
    assert HuggingFaceTokenizer(stock).prefix_ids == []
    stock.add_tokens(["<more>"])
    assert HuggingFaceTokenizer(stock).vocab_size == stock.vocab_size + 1 == 258


def test_a_table_of_positions_is_a_limit_that_is_named(tokens):
    model = HuggingFaceCausalLM(gpt2())
    _, state = model(tokens)
    with pytest.raises(InputError, match="table of 64 positions and cannot read 80 tokens"):
        model(tokens, state)


@torch.no_grad()
def test_padding_takes_no_place_in_a_table(tokens):
    model = HuggingFaceCausalLM(gpt2())
    padding = torch.zeros(2, 80, dtype=torch.bool)
    padding[:, 10:30] = True
    twice = tokens.repeat(1, 2)
    found, state = model(twice, padding=padding, keep="last")
    alone, _ = model(torch.cat([twice[:, :10], twice[:, 30:]], dim=1), keep="last")
    torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)
    assert state.tokens_seen.tolist() == [60, 60]


def test_a_table_with_two_places_more_is_a_limit_too(tokens):
    shape = dict(vocab_size=257, hidden_size=32, word_embed_proj_dim=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2)
    model = HuggingFaceCausalLM(transformers.OPTForCausalLM(transformers.OPTConfig(**shape, max_position_embeddings=32)))
    with pytest.raises(InputError, match="table of 32 positions and cannot read 40 tokens"):
        model(tokens)


def test_a_dtype_is_that_of_the_weights(tmp_path):
    llama().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    for asked, found in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model, _ = load_causal_lm(tmp_path, dtype=asked)
        assert {parameter.dtype for parameter in model.parameters()} == {found} and not model.training


def test_what_is_not_there_is_refused(tokens):
    model = HuggingFaceCausalLM(llama())
    with pytest.raises(InputError, match="no compressive memory"):
        model(tokens, memory=False)
    with pytest.raises(InputError, match="token ids must be 0 to 256, got 0 to 257"):
        model(torch.tensor([[0, 257]]))
    # 0 and 1 for a mask: `~` of it is no mask, and every token would count.
    with pytest.raises(InputError, match=r"padding is torch\.int64 \[2, 40\]; it must be bool"):
        model(tokens, padding=torch.zeros_like(tokens))


def test_a_model_with_another_state_is_refused():
    config = transformers.MambaConfig(vocab_size=257, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(InputError, match="mamba"):
        HuggingFaceCausalLM(transformers.MambaForCausalLM(config))


@pytest.mark.parametrize("broken", ["nothing", "config", "truncated", "pickle"])
def test_a_folder_that_cannot_be_loaded_is_named(tmp_path, broken):
    folder = tmp_path / "model"
    if broken != "nothing":
        llama().save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    if broken == "config":
        (folder / "config.json").write_text("{")
    if broken == "truncated":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    if broken == "pickle":
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=str(folder)):
        load_causal_lm(folder)


def test_without_transformers_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="pip install 'infini-attention\\[hf\\]'"):
        load_causal_lm(tmp_path)


def test_a_checkpoint_of_this_library_is_sent_to_its_own_door(make, tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="give checkpoint= in place of hf="):
        load_causal_lm(tmp_path)
