"""The door to Hydra: overrides in, plain values out."""

import difflib
import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from infini.cli import resolvers
from infini.errors import InputError

MODULE = "infini.conf"

resolvers.register()


def compose(name: str, overrides: list[str]) -> dict[str, Any]:
    """Composes conf/NAME.yaml with overrides such as "samples=20"; leaves no folder behind.

    Raises:
        InputError: a key that the configuration lacks, a value that does not parse, a mandatory value left out.

    >>> compose("passkey", ["samples=3"])["samples"]
    3
    """
    try:
        return plain(_compose(name, overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(explain(error, name)) from error


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration with every interpolation resolved, as dicts, lists and scalars."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def explain(error: Exception, name: str) -> str:
    """One sentence for what Hydra says in several lines about conf/NAME.yaml, with the key that was meant."""
    text = str(error)
    if missing := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{missing[1]} is missing: give {missing[1]}=..."
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read ({text.splitlines()[0]}): write key=value, quoted for the shell"
    if unknown := re.match(r"Could not override '(.+?)'", text):
        keys = list(_keys(OmegaConf.to_container(_compose(name, []))))
        near = difflib.get_close_matches(unknown[1], keys, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see infini {name.replace('_', ' ')} --help"
        return f"nothing reads {unknown[1]}; {hint}"
    if launcher := re.search(r"Could not (?:find|load) 'hydra/launcher/(joblib|submitit_\w+)'", text):
        extra = "sweep" if launcher[1] == "joblib" else "slurm"
        return f"the launcher {launcher[1]} is not installed: pip install 'infini-attention[{extra}]', or leave hydra/launcher out"
    options = r"Could not find '(.+?)'\s+Available options in .*?:\s+(.*?)\nConfig search path"
    if option := re.search(options, text, re.DOTALL):
        # Hydra names those of the outermost group, and no files below it.
        group = files(MODULE).joinpath(option[1].rpartition("/")[0])
        names = sorted(file.name.removesuffix(".yaml") for file in group.iterdir() if file.name.endswith(".yaml")) if group.is_dir() else []
        return f"there is no {option[1]}: use one of {', '.join(names or option[2].split())}"
    if text.startswith("Error merging override"):
        return f"{text.splitlines()[0].split(' ', 3)[3]} is of another form than the value that it replaces"
    if text.startswith("Ambiguous value"):
        return f"{text.splitlines()[0]}: a list is written [a,b]; a sweep, with train -m alone, a,b"
    lines = [line.strip() for line in text.splitlines() if not re.match(r"\s*(full_key:|object_type=)", line)]
    return " ".join(lines)


def _compose(name: str, overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_module(MODULE, version_base="1.3"):
        return hydra_compose(name, overrides)


def _keys(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
