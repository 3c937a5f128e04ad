"""What every test shares: a fixed seed, no GPU tests without a GPU, and kernels that are interpreted then."""

import contextlib
import gc
import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is first imported, which any test may do.
    os.environ["TRITON_INTERPRET"] = "1"

with contextlib.suppress(ImportError):  # comes with rouge-score
    from absl.logging import get_absl_handler

    # absl keeps the stderr of its first import and closes it when Hydra sets up logging anew: in a test, what pytest captures with.
    get_absl_handler().python_handler.setStream(sys.__stderr__)


def pytest_collection_finish():
    gc.freeze()  # what is imported by now stays: no collection in a test needs to look through it, each would take half a second


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    os.environ["INFINI_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def needs_gpu(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def kernel_device():
    """Where Triton's kernels run in a test: on the GPU, or interpreted on the CPU."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return torch.device("cuda")
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        # The interpreter's numbers are arrays of one element, which NumPy since 2.4 does not take for an integer.
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    modules = set()

    def call(self, *args, **kwargs):
        # Its own patches the language at every call of a function, which takes longer than most functions; nothing undoes what the
        # first call did, and a launch does its part itself.
        if self.fn.__module__ not in modules:
            modules.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang_tensor = patched
    interpreter.InterpretedFunction.__call__ = call
    return torch.device("cpu")
