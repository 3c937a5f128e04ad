"""Gates that learn beside an adapter, in the checkpoints of a `Trainer`."""

import hashlib
from pathlib import Path

from safetensors.torch import save
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from infini.errors import InputError
from infini.hf.adapters import GATES_FILE, gates_of, load_gates, save_gates


class KeepGates(TrainerCallback, ExportableState):
    """`Trainer(..., callbacks=[KeepGates()])`: what `train_gates` frees is in every checkpoint, and comes back when training goes on.

    A `Trainer` saves of a PEFT model the adapter alone, and would go on with the gates of the base. This writes `gates.safetensors`
    (`save_gates`) into each checkpoint's folder and notes its checksum in the trainer's state. `train(resume_from_checkpoint=...)` and
    `load_best_model_at_end` load it. A callback is not told which folder is gone on from: it is looked for in `output_dir`, and the
    checksum must be right. Gates of a checkpoint that lies elsewhere can be put back first with `load_gates`. In a
    `hyperparameter_search` each trial's checkpoints have its own gates.

    Raises:
        InputError: at the beginning of training, the gates that belong to the checkpoint are not found.

    Example:
        >>> import tempfile
        >>> from types import SimpleNamespace
        >>> from transformers import TrainerState
        >>> from infini.hf import InfiniForCausalLM, InfiniHFConfig
        >>> model = InfiniForCausalLM(InfiniHFConfig(hidden_size=32, num_hidden_layers=1))
        >>> run = SimpleNamespace(output_dir=tempfile.mkdtemp())
        >>> KeepGates().on_save(run, TrainerState(global_step=4), None, model=model)
        >>> load_gates(model, f"{run.output_dir}/checkpoint-4")
        ['blocks.0.attention.beta']
    """

    def __init__(self):
        self._model: nn.Module | None = None

    def state(self) -> dict:
        """What the `Trainer` writes into `trainer_state.json`."""
        return {"args": {}, "attributes": {} if self._model is None else {"sha256": _checksum(self._model)}}

    def on_train_begin(self, args, state, control, model=None, **others) -> None:
        """Puts the gates back where training goes on from a checkpoint."""
        self._model = model
        kept = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("sha256")
        if not state.global_step or _checksum(model) == kept:
            return
        if kept is None:
            raise InputError(
                f"the checkpoint of step {state.global_step} was saved without KeepGates, and does not say which gates are its own: begin "
                "anew, or leave KeepGates out and call load_gates before train"
            )
        folder = _folder(args, state)
        if (folder / GATES_FILE).is_file():
            load_gates(model, folder)
        if _checksum(model) != kept:
            raise InputError(
                f"{folder} does not hold the gates of the checkpoint that is gone on from: call load_gates(model, CHECKPOINT) before train"
            )

    def on_save(self, args, state, control, model=None, **others) -> None:
        """Writes the gates beside the adapter."""
        if state.is_world_process_zero:
            for folder in [_folder(args, state)] if state.trial_params is None else _of_trial(args, state, _checksum(model)):
                save_gates(model, folder)

    def on_train_end(self, args, state, control, model=None, **others) -> None:
        """Loads the gates of the best adapter after the `Trainer` has loaded that."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            load_gates(model, state.best_model_checkpoint)


def _folder(args, state) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _of_trial(args, state, checksum: str) -> list[Path]:
    """Each trial has a folder of its own, which no callback is told; what the `Trainer` has just noted there names the gates."""
    notes = Path(args.output_dir).rglob(f"checkpoint-{state.global_step}/trainer_state.json")
    return [note.parent for note in notes if checksum in note.read_text()]


def _checksum(model: nn.Module) -> str:
    return hashlib.sha256(save({name: gate.detach().cpu().contiguous() for name, gate in gates_of(model).items()})).hexdigest()
