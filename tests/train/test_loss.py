import torch

from infini.data.batch import Batch
from infini.train.loss import loss_of


def test_answers_count_in_both_sums_and_the_first_token_in_none():
    torch.manual_seed(0)
    tokens = torch.randint(5, (2, 4))
    answer = torch.tensor([[1, 0, 0, 1], [1, 0, 1, 0]], dtype=torch.bool)
    logits = torch.randn(2, 3, 5)
    sums = loss_of(lambda seen: (logits, None), Batch(tokens, answer, segments=1))

    losses = [
        [-logits[row, t].log_softmax(-1)[tokens[row, t + 1]] for t in range(3)] for row in range(2)
    ]
    torch.testing.assert_close(sums.tokens, torch.stack(sum(losses, [])).sum())
    torch.testing.assert_close(sums.answers, losses[0][2] + losses[1][1])


def test_the_model_sees_all_but_the_last_token():
    tokens = torch.tensor([[3, 1, 2]])
    seen = []

    def model(tokens):
        seen.append(tokens.tolist())
        return torch.zeros(1, 2, 4), None

    loss_of(model, Batch(tokens, tokens == 2, segments=1))
    assert seen == [[[3, 1]]]


def test_sixteen_bit_logits_are_summed_in_fp32():
    tokens = torch.zeros(1, 5001, dtype=torch.long)
    logits = torch.zeros(1, 5000, 8, dtype=torch.bfloat16)
    sums = loss_of(lambda seen: (logits, None), Batch(tokens, tokens == 1, segments=1))
    assert sums.tokens.dtype == torch.float32
    torch.testing.assert_close(sums.tokens, 5000 * torch.tensor(8.0).log())
