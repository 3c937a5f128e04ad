"""`infini peak`: a prompt of any length through `InfiniForCausalLM.generate` and through a session, in memory that does not grow."""

import time
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Literal

from infini.cli.build import fill, locate
from infini.cli.compose import MODULE, compose
from infini.errors import InputError
from infini.report.record import make_record, write_record
from infini.report.render import render


@dataclass(frozen=True)
class Command:
    """The keys of conf/peak.yaml that are not the task's, described there."""

    checkpoint: str | None
    output: str
    ways: tuple[Literal["generate", "session"], ...]
    piece: int
    device: str
    dtype: Literal["float32", "bfloat16", "float16"]

    def __post_init__(self) -> None:
        if self.piece < 1:
            raise InputError(f"piece is {self.piece}; it must be at least 1")


def run(arguments: list[str]) -> None:
    """Asks in every way and leaves a record with its table.

    Raises:
        InputError: an override, a checkpoint or an output folder that cannot be used, or a system that cannot measure its peak.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: infini peak [KEY=VALUE ...]\n\n" + (files(MODULE) / "peak.yaml").read_text())
        return
    config = compose("peak", arguments)
    command, settings, ask = read(config)
    import torch

    from infini import checkpoint
    from infini.cli.device import choose_device
    from infini.data.tokenizer import load_tokenizer
    from infini.hf import InfiniForCausalLM
    from infini.report.fingerprint import fingerprint
    from infini.train.reach import read_reach

    folder, device, started = checkpoint.resolve(command.checkpoint), choose_device(command.device), time.time()
    tokenizer = load_tokenizer(checkpoint.read_config(folder))
    model = InfiniForCausalLM.from_pretrained(folder, dtype=getattr(torch, command.dtype)).to(device).eval()
    model.piece = command.piece
    ways = {"generate": _generate(model, device), "session": _session(model.model, command.piece)}
    rows = ask({name: ways[name] for name in command.ways}, tokenizer, settings, device)
    reach = read_reach(folder)
    data = {"checkpoint_sha256": fingerprint(model.model)} | ({} if reach is None else {"trained": reach})
    seeds = {"prompts": settings.seed}
    record = Path(command.output) / "record.json"
    write_record(make_record("peak", config=config, data=data, seeds=seeds, started=started, rows=rows), record)
    written = render(record)
    print(written[0].read_text())
    print("\n".join(map(str, [record, *written])))


def read(config: dict) -> tuple:
    """From a composed conf/peak.yaml: the command's own keys, the task's settings, and its function."""
    own = {field.name for field in fields(Command)}
    command = fill(Command, "", {key: value for key, value in config.items() if key in own})
    asked = {key: value for key, value in config.items() if key not in own and key[0] != "_"}
    return command, fill(locate(config["_target_"]), "", asked), locate(config["_run_"])


def _generate(model, device):
    """As a user of transformers does it: ids and mask on the device, one call."""
    import torch

    def way(ids, count):
        ids = ids.to(device).unsqueeze(0)
        options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return found.sequences[0, ids.shape[1] :].tolist(), found.past_key_values.nbytes

    return way


def _session(model, piece):
    from infini.session import StreamingSession

    def way(ids, count):
        session = StreamingSession(model, piece=piece)
        session.feed(ids)
        return [int(token) for token in session.generate(count)], session.state_bytes

    return way
