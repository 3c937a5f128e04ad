"""Who may import whom: read from the source, so that an import inside a function counts too."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"infini": ROOT / "infini", "infini.tasks": ROOT / "tasks", "baselines": ROOT / "baselines"}

# A module imports from lower lines only, or from its own package.
LEVELS = [
    {"cli"},
    {"bench"},
    {"testing"},
    {"evaluate"},
    {"hf"},
    {"train", "session", "loading"},
    {"token_step"},
    {"model", "data", "report"},
    {"attention", "decoder"},
    {"checkpoint"},
    {"state"},
    {"layers", "local", "memory"},
    {"kernels", "causal", "gated_delta", "compiled", "config", "segments", "tokenizer_file"},
    {"field_types"},
    {"device", "tensor_file"},
    {"protocol", "errors"},
    {"reference"},
]
HEIGHT = {part: -line for line, parts in enumerate(LEVELS) for part in parts}
OPEN_TO_TASKS = {"protocol", "session", "data", "report", "errors"}
OPEN_TO_BASELINES = OPEN_TO_TASKS | {"local", "layers", "memory", "segments", "state", "compiled", "config", "decoder", "gated_delta"}
# Libraries that one part of infini alone may import: the door to each.
DOORS = {"hydra": "cli", "omegaconf": "cli", "transformers": "hf", "matplotlib": "report"}
DOORS |= {"lm_eval": "evaluate", "flash_attn": "causal", "flash_attn_interface": "causal", "triton": "kernels", "fla": "gated_delta"}
# Slow or optional: only inside a function.
LAZY = {"transformers", "tokenizers", "matplotlib", "flash_attn", "fla", "lm_eval", "datasets", "tensorboard", "rouge_score"}
# Except in these: their package imports them where the library is installed, and does without them where it is not.
ON_DEMAND = {f"infini.hf.{name}" for name in ("auto", "byte_tokenizer", "cache", "config", "keep_gates", "model")} | {"infini.evaluate.lm"}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in ROOMS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Every imported dotted name, and whether it is imported as soon as the module is."""
    tree = ast.parse(source)
    inside = {id(node) for scope in ast.walk(tree) if isinstance(scope, ast.FunctionDef) for node in ast.walk(scope)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, id(node) not in inside) for name in names)


def part(name: str) -> str:
    """infini.report.record -> report; infini.tasks.passkey -> tasks."""
    return name.split(".")[1] if "." in name else ""


def complaint(importer: str, name: str, at_once: bool) -> str | None:
    """Why `importer` may not import `name`, or None."""
    here, top = part(importer), name.split(".")[0]
    if name.startswith("."):
        return "relative import"
    if top == "tests":
        return "tests are never imported"
    if top in LAZY and at_once and importer not in ON_DEMAND:
        return f"{top} is imported when the module is"
    if top in DOORS and importer.startswith("infini.") and here != DOORS[top]:
        return f"only infini.{DOORS[top]} imports {top}"
    if here == "reference" and top not in ("torch", *sys.stdlib_module_names):
        return "reference imports torch only"
    if importer.startswith("baselines"):
        return None if top != "infini" or part(name) in OPEN_TO_BASELINES else "not open to baselines"
    if top == "baselines":
        return "infini never imports baselines"
    if top != "infini":
        return None
    there = part(name)
    if here == there:
        return None
    if importer.startswith("infini.tasks.examples.") and name == "infini":
        return None  # an example uses the public names, as anybody would
    if there == "tasks":
        return "infini never imports tasks"
    if here == "tasks":
        return None if there in OPEN_TO_TASKS else "not open to tasks"
    if there == "reference":
        return None if here in ("bench", "testing") else "reference is for tests and bench alone"
    if there not in HEIGHT:
        return "not a module with a level: import from where a name is defined, or give a new module its level"
    return None if HEIGHT[here] > HEIGHT[there] else f"{here} is not above {there}"


def test_every_import_is_allowed():
    wrong = []
    for module, path in modules().items():
        if module == "infini":  # names of the public modules, resolved when they are used
            continue
        for name, at_once in imports(path.read_text()):
            if why := complaint(module, name, at_once):
                wrong.append(f"{module} imports {name}: {why}")
    assert not wrong, "\n".join(wrong)


def test_every_part_has_a_level():
    parts = {part(module) for module in modules() if module.startswith("infini.")}
    assert parts - {"tasks"} <= HEIGHT.keys()


def test_there_are_no_circles():
    known = modules()
    graph = {}
    for module, path in known.items():
        names = [name for name, _ in imports(path.read_text())] if module != "infini" else []
        # `from a.b import c` names the module a.b.c or something in a.b.
        graph[module] = {name if name in known else name.rpartition(".")[0] for name in names} & known.keys() - {module}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


@pytest.mark.parametrize(
    ("importer", "name", "at_once", "why"),
    [
        ("infini.memory", "infini.state.InfiniState", True, "memory is not above state"),
        ("infini.train.loop", "infini.session.StreamingSession", True, "train is not above session"),
        ("infini.model", "infini.reference.linear_update", True, "tests and bench alone"),
        ("infini.reference", "infini.memory.retrieve", True, "reference imports torch only"),
        ("infini.reference", "einops.rearrange", True, "reference imports torch only"),
        ("infini.cli.passkey", "infini.tasks.passkey.benchmark.run", False, "infini never imports tasks"),
        ("infini.cli.train", "baselines.memorizing", False, "infini never imports baselines"),
        ("infini.tasks.passkey.benchmark", "infini.model.InfiniTransformer", True, "not open to tasks"),
        ("infini.tasks.examples.read_once", "infini.model.InfiniTransformer", True, "not open to tasks"),
        ("infini.train.loop", "omegaconf.DictConfig", False, "only infini.cli imports omegaconf"),
        ("infini.hf.causal_lm", "transformers.AutoModel", True, "transformers is imported when the module is"),
        ("infini.session", "tests.model", True, "tests are never imported"),
        ("infini.attention", "triton", False, "only infini.kernels imports triton"),
        ("infini.bench.gated_delta", "fla.ops.gated_delta_rule", False, "only infini.gated_delta imports fla"),
        ("infini.model", ".attention.InfiniAttention", True, "relative import"),
        ("infini.model", "infini.InfiniConfig", True, "import from where a name is defined"),
    ],
)
def test_the_rule_refuses(importer, name, at_once, why):
    assert why in (complaint(importer, name, at_once) or "")


def test_imports_inside_functions_are_seen():
    source = "import a\nfrom b import c\ndef f():\n    from d.e import g\n    import h\n"
    assert set(imports(source)) == {("a", True), ("b.c", True), ("d.e.g", False), ("h", False)}


def test_importing_infini_is_light():
    code = """
import sys, infini, infini.errors
assert not {"torch", "numpy"} & set(sys.modules)
infini.load
assert "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_models_need_none_of_the_optional_libraries():
    code = """
import sys
for name in ("transformers", "datasets", "lm_eval", "hydra", "omegaconf", "matplotlib", "flash_attn", "tensorboard", "triton"):
    sys.modules[name] = None  # importing it fails
import torch, infini, infini.train, infini.hf.causal_lm, infini.evaluate, infini.report.render
config = infini.InfiniConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, segment_length=4)
model = infini.InfiniTransformer(config).eval()
assert infini.StreamingSession(model).feed([1, 2, 3, 4, 5]).shape == (1, 256)
for package, name, extra in ((infini.hf, "InfiniForCausalLM", "hf"), (infini.evaluate, "InfiniLM", "eval")):
    try:
        getattr(package, name)
    except infini.InputError as error:
        assert f"pip install 'infini-attention[{extra}]'" in str(error)
    else:
        raise AssertionError(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
