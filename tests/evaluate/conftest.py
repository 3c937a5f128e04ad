"""A small model of the protocol and its byte tokenizer, wrapped for lm-eval."""

import pytest
import torch

pytest.importorskip("lm_eval")


@pytest.fixture(scope="session", autouse=True)
def machine_not_described():
    """lm-eval asks pip and a dozen other programs about the machine after every run, which takes longer than the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "not asked for")
        yield


@pytest.fixture(scope="session")
def transformer():
    from infini import InfiniConfig, InfiniTransformer

    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)
    model = InfiniTransformer(InfiniConfig.long(**shape, segment_length=8)).eval()
    with torch.no_grad():
        model.embedding.weight[0] = 0  # byte 0 is never the likeliest: lm-eval's own model would take it for the end
    return model


@pytest.fixture
def wrap(transformer):
    from infini.evaluate import InfiniLM

    return lambda **options: InfiniLM(pretrained=transformer, **options)
