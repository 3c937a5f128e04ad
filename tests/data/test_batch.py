import pytest
import torch

from infini.data.batch import Batch


def test_bytes_are_widened_on_the_way_to_the_device():
    tokens = torch.tensor([[0, 127, 255]], dtype=torch.uint8)
    moved = Batch(tokens, tokens > 200, segments=1).to("cpu")
    assert moved.tokens.dtype == torch.int64
    assert moved.tokens.tolist() == [[0, 127, 255]]  # not -1
    assert moved.answer.tolist() == [[False, False, True]]


@pytest.mark.parametrize("answer", [torch.zeros(1, 3), torch.zeros(1, 2, dtype=torch.bool)])
def test_answer_must_be_bool_of_the_shape_of_the_tokens(answer):
    with pytest.raises(ValueError, match=r"answer must be bool of shape \(1, 3\)"):
        Batch(torch.zeros(1, 3, dtype=torch.long), answer, segments=1)


def test_a_row_s_first_token_may_be_called_an_answer_where_a_document_begins():
    """Nothing predicts it, and it is not counted."""
    begins = torch.tensor([[True, False, False]])
    batch = Batch(torch.zeros(1, 3, dtype=torch.long), begins, segments=1, reset=begins)
    assert batch.predicted_tokens == 2


def test_a_row_must_have_something_to_predict():
    with pytest.raises(ValueError, match="at least 2"):
        Batch(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.bool), segments=1)
