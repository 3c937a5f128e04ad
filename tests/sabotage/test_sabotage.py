"""Errors put into copies of the library on purpose; each must turn the tests named beside it red.

Most are faults of published implementations (tests/README.md says which). An edit that no longer applies fails: whoever
rewrites a line that is sabotaged here says what the fault looks like in the new one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MEMORY, ATTENTION, LOCAL, SEGMENTS = (f"infini/{name}.py" for name in ("memory", "attention", "local", "segments"))
MODEL, STATE, SESSION, CHECKPOINT = (f"infini/{name}.py" for name in ("model", "state", "session", "checkpoint"))
REFERENCE, ROTARY, DECODER = "infini/reference.py", "infini/layers/rotary.py", "infini/decoder.py"

RULE = "tests/memory/test_write_rules.py::test_equals_the_reference"
LINEAR, DELTA, GAMMA = (f"{RULE}[{rule}-elu-gated-started-awkward]" for rule in ("linear", "delta", "gamma_delta"))
EMPTY = f"{RULE}[linear-elu-paper-empty-awkward]"
LAW = "tests/memory/test_properties.py::test_"
NEAR = "tests/local/test_local_attention.py::test_"
LAYER = "tests/attention/test_attention.py::test_"
WALK = "tests/segments/test_plan.py::test_equals_a_walk"
WHOLE = "tests/model/test_schedules.py::test_"
ANY = "tests/conformance/test_segment_model.py::test_"
VALUE = "tests/state/test_state.py::test_"
STREAM = "tests/session/test_session.py::test_"
PAPER = "tests/reference/test_equations.py::test_"

# name: edits (file, old, new), tests that must turn red.
SABOTAGES = {
    # The order of reading and writing.
    "read-after-write": (
        [(MEMORY, "return sums[:, :-1], sums[:, -1]", "return sums[:, 1:], sums[:, -1]")],
        [LINEAR, f"{LAYER}equals_the_published_layer", f"{ANY}causality[paper-linear]"],
    ),
    "one-segment-late": (
        [(MEMORY, "return sums[:, :-1], sums[:, -1]", "return torch.cat([sums[:, :1], sums[:, :-2]], 1), sums[:, -1]")],
        [LINEAR, f"{LAYER}equals_the_published_layer", f"{ANY}any_split_gives_the_same[paper-linear-1x1x1x1x1]"],
    ),
    "last-segment-written-twice": (
        [(MEMORY, "return sums[:, :-1], sums[:, -1]", "return sums[:, :-1], sums[:, -1] + additions[:, -1]")],
        [LINEAR, f"{STREAM}the_memory_is_written_once_a_segment", f"{ANY}any_split_gives_the_same[paper-linear-12x6x3]"],
    ),
    # Reading and writing.
    "normalizer-dropped": (
        [(MEMORY, "    if normalizer is not None:\n        read = read", "    if False:\n        read = read")],
        [LINEAR, f"{LAW}one_pair_twice_the_measured_halving", f"{LAYER}equals_the_published_layer"],
    ),
    "normalizer-elementwise": (
        [
            (
                MEMORY,
                "(grouped @ normalizer.unsqueeze(-1))",
                "(grouped * normalizer.unsqueeze(-2)).mean(dim=-1, keepdim=True)",
            )
        ],
        [LINEAR, f"{LAYER}equals_the_published_layer"],
    ),
    "normalizer-starts-above-zero": (
        [(ATTENTION, "else torch.zeros_like(matrix[..., 0])", "else torch.full_like(matrix[..., 0], 1 / dim)")],
        [f"{LAYER}equals_the_published_layer", f"{WHOLE}from_nothing_equals_the_oracle[paper-linear-parallel]"],
    ),
    "denominator-unguarded": (
        [(MEMORY, "@ normalizer.unsqueeze(-1)).clamp(min=DENOMINATOR_FLOOR)", "@ normalizer.unsqueeze(-1))")],
        [f"{LAW}first_segment_has_no_nan"],
    ),
    "denominator-floor-too-high": (
        [(MEMORY, "DENOMINATOR_FLOOR = 1e-12", "DENOMINATOR_FLOOR = 1e-6")],
        [f"{LAW}tiny_features_survive"],
    ),
    "elu-without-one": (
        [(MEMORY, "return torch.exp(x.clamp(max=0)) + F.relu(x)", "return F.elu(x)")],
        [LINEAR, f"{LAW}feature_maps_equal_the_reference", f"{LAW}elu_features_are_positive_and_keep_their_digits"],
    ),
    "elu-plus-one-loses-digits": (
        [(MEMORY, "return torch.exp(x.clamp(max=0)) + F.relu(x)", "return F.elu(x) + 1")],
        [f"{LAW}elu_features_are_positive_and_keep_their_digits"],
    ),
    "delta-subtracts-nothing": (
        [(MEMORY, 'if update_rule != "linear":', "if False:")],
        [DELTA, f"{LAW}delta_of_a_stored_pair_leaves_the_matrix", f"{LAYER}equals_the_published_layer"],
    ),
    "gamma-left-out": (
        [(MEMORY, "z = z + (new_part.unsqueeze(-1) * f).sum(dim=-2)", "z = z + f.sum(dim=-2)")],
        [GAMMA, f"{LAW}one_pair_twice_the_measured_halving"],
    ),
    "gamma-with-gradient": (
        [(MEMORY, "        with torch.no_grad():\n            new_part", "        with torch.enable_grad():\n            new_part")],
        [GAMMA],
    ),
    "write-gate-ignored": (
        [(MEMORY, "features = strength * sigma", "features = sigma")],
        [LINEAR, f"{WHOLE}from_nothing_equals_the_oracle[long-parallel]"],
    ),
    "detached-on-write": (
        [(MEMORY, "return MemoryState(matrices, normalizers),", "return MemoryState(matrices.detach(), normalizers.detach()),")],
        [
            LINEAR,
            f"{LAYER}memory_alone_trains_keys_and_values",
            f"{WHOLE}paper_layer_gives_the_memory_of_every_segment_its_gradient",
        ],
    ),
    "detached-between-calls": (
        [(MODEL, "state = InfiniState(tuple(layers),", "state = InfiniState(tuple(x.map(Tensor.detach) for x in layers),")],
        [f"{WHOLE}from_nothing_equals_the_oracle[paper-linear-stream]", f"{VALUE}detach_cuts_gradients"],
    ),
    "keys-not-of-unit-length": (
        [(ATTENTION, "return memory.unit(k)", "return k")],
        [f"{WHOLE}from_nothing_equals_the_oracle[deltanet-parallel]"],
    ),
    # The gate.
    "gate-flipped": (
        [
            (
                MEMORY,
                "memory_weight * memory_output + (1 - memory_weight) * local_output",
                "memory_weight * local_output + (1 - memory_weight) * memory_output",
            )
        ],
        [LINEAR, f"{LAW}gate_limits_and_sign", f"{LAYER}each_head_has_its_gate_and_its_own_sign"],
    ),
    "gate-shut-at-the-start": (
        [(ATTENTION, "self.beta = nn.Parameter(torch.zeros(heads))", "self.beta = nn.Parameter(torch.full((heads,), -100.0))")],
        [f"{LAYER}gates_start_half_open_and_learn"],
    ),
    "gate-almost-shut-at-the-start": (
        [(ATTENTION, "self.beta = nn.Parameter(torch.zeros(heads))", "self.beta = nn.Parameter(torch.full((heads,), -10.0))")],
        [f"{LAYER}gates_start_half_open_and_learn"],
    ),
    "gate-frozen": (
        [(ATTENTION, "nn.Parameter(torch.zeros(heads))", "nn.Parameter(torch.zeros(heads), requires_grad=False)")],
        [f"{LAYER}gates_start_half_open_and_learn", f"{LAYER}equals_the_published_layer"],
    ),
    "one-gate-for-all-heads": (
        [(ATTENTION, "self.beta = nn.Parameter(torch.zeros(heads))", "self.beta = nn.Parameter(torch.zeros(1))")],
        [f"{LAYER}gates_start_half_open_and_learn", "tests/model/test_model.py::test_parameters_by_hand"],
    ),
    "gate-trained-like-a-matrix": (
        [(MODEL, '        "beta", "write_gate"', '        "gamma", "write_gate"')],
        ["tests/model/test_model.py::test_gates_and_memory_scales_have_a_group_of_their_own"],
    ),
    "empty-memory-mixed-in": (
        [(MEMORY, "return torch.where(has_memory[:, :, None, None, None], mixed, local_output)", "return mixed")],
        [EMPTY, f"{LAW}an_empty_memory_leaves_local_output_and_gradients_whole", f"{LAYER}equals_the_published_layer"],
    ),
    "knock-out-still-reads": (
        [(ATTENTION, "readable = plan.any_memory and use_memory", "readable = plan.any_memory")],
        [f"{WHOLE}silenced_memory_equals_the_oracle[paper-linear]", f"{STREAM}decoding_reads_the_memory"],
    ),
    # Heads, layers and positions.
    "heads-split-by-view": (
        [(ATTENTION, "proj(x).unflatten(-1, (-1, dim))", "proj(x).reshape(len(x), -1, x.shape[1], dim).transpose(1, 2)")],
        [f"{ANY}causality[paper-linear]", f"{LAYER}equals_the_published_layer", f"{ANY}any_split_gives_the_same[paper-linear-4x9x1x7]"],
    ),
    "heads-of-another-group-locally": (
        [(LOCAL, "x.repeat_interleave(group, dim=2)", "x.repeat(1, 1, group, 1)")],
        [f"{NEAR}equals_the_reference", f"{LAYER}equals_the_published_layer"],
    ),
    "heads-of-another-group-in-memory": (
        [
            (MEMORY, '"b s n (g r) k -> b s g (r n) k"', '"b s n (r g) k -> b s g (r n) k"'),
            (MEMORY, '"b s g (r n) v -> b s n (g r) v"', '"b s g (r n) v -> b s n (r g) v"'),
        ],
        [LINEAR, f"{LAYER}equals_the_published_layer", f"{WHOLE}from_nothing_equals_the_oracle[paper-linear-parallel]"],
    ),
    "one-state-for-all-layers": (
        [(MODEL, "zip(self.blocks, state.layers if", "zip(self.blocks, state.layers[:1] * len(self.blocks) if")],
        [f"{ANY}any_split_gives_the_same[paper-linear-12x6x3]", f"{WHOLE}from_a_state_equals_the_oracle[paper-linear-13-parallel]"],
    ),
    "turned-keys-in-memory": (
        [(ATTENTION, "q, k, v, strength, mixed,", "q, rotate(k, *rotary), v, strength, mixed,")],
        [f"{LAYER}positions_turn_local_attention_alone", f"{WHOLE}from_nothing_equals_the_oracle[paper-linear-parallel]"],
    ),
    "rotary-exponent": (
        [(ROTARY, "device=positions.device) / dim)", "device=positions.device))")],
        [f"{LAYER}rotary_angles_are_the_published_ones", f"{WHOLE}from_nothing_equals_the_oracle[paper-linear-parallel]"],
    ),
    # Local attention.
    "no-causal-mask": (
        [(LOCAL, "is_causal=True", "is_causal=False")],
        [f"{NEAR}equals_the_reference", f"{ANY}causality[paper-linear]"],
    ),
    "window-one-too-wide": (
        [(SEGMENTS, "(self.history + place - self.span + 1)", "(self.history + place - self.span)")],
        [f"{NEAR}equals_the_reference", WALK],
    ),
    "new-document-sees-the-old-one": (
        [(SEGMENTS, "(h + place - in_document).clamp(min=0).maximum(h + place - self.span + 1)", "h + place - self.span + 1 + 0 * place")],
        [f"{NEAR}documents_do_not_see_each_other", f"{ANY}a_document_sees_nothing_before_it[long-21]", WALK],
    ),
    # What crosses a call.
    "memory-unread-when-decoding": (
        [(ATTENTION, "readable = plan.any_memory and use_memory", "readable = plan.any_memory and use_memory and plan.tokens > 1")],
        [
            f"{STREAM}decoding_reads_the_memory",
            f"{STREAM}greedy_generation_is_what_one_call_says",
            f"{ANY}any_split_gives_the_same[paper-linear-1x1x1x1x1]",
        ],
    ),
    "open-segment-dropped": (
        [(SEGMENTS, "self.open_length = torch.full((self.batch,), total % n)", "self.open_length = torch.zeros(self.batch).long()")],
        [WALK, f"{STREAM}greedy_generation_is_what_one_call_says", f"{ANY}any_split_gives_the_same[paper-linear-4x9x1x7]"],
    ),
    "prompt-dropped-but-its-end": (
        [(SESSION, "range(0, longest, self.piece)", "range((longest - 1) // self.piece * self.piece, longest, self.piece)")],
        [f"{STREAM}pieces_and_progress", f"{ANY}a_session_equals_one_call[paper-linear]"],
    ),
    "stopped-rows-go-on": (
        [(SESSION, "padding=done.unsqueeze(1) if bool(done.any()) else None", "padding=None")],
        [f"{STREAM}stop_ids_end_each_row_and_then_all"],
    ),
    "restored-without-its-logits": (
        [(SESSION, "session._logits, session._known = logits", "session._logits, session._known = 0 * logits")],
        [f"{STREAM}a_session_can_stop_between_tokens"],
    ),
    "reset-spares-the-memory": (
        [(SEGMENTS, "self.fresh = None if fresh is None or not bool(fresh.any()) else self._send(fresh)", "self.fresh = None")],
        [WALK, f"{ANY}a_document_sees_nothing_before_it[paper-linear-21]"],
    ),
    "reset-changes-the-old-state": (
        [(STATE, "getattr(self, name).masked_fill(", "getattr(self, name).masked_fill_(")],
        [f"{VALUE}reset_empties_the_named_rows_whole"],
    ),
    "reset-by-multiplying": (
        [(STATE, "return torch.where(there.reshape(-1, *[1] * (x.dim() - 1)), torch.zeros_like(x), x)", "return x * ~there.reshape(-1, *[1] * (x.dim() - 1))")],
        [f"{VALUE}reset_forgets_an_infinite_memory_too"],
    ),
    "padding-counted-as-tokens": (
        [(DECODER, "        if padding is not None:\n            tokens, reset,", "        if False:\n            tokens, reset,")],
        [f"{ANY}padding_is_not_there[paper-linear-left-21]", f"{ANY}padding_is_not_there[paper-linear-between-4x9x1x7]"],
    ),
    "state-of-any-model-taken": (
        [(DECODER, "if state.shape != self.state_shape:", "if False:")],
        [f"{VALUE}a_state_of_another_model_batch_or_dtype_is_refused"],
    ),
    # Precision.
    "memory-in-16-bit": (
        [
            (ATTENTION, "dtype = torch.promote_types(torch.float32, like.dtype)", "dtype = like.dtype"),
            (ATTENTION, "return x.to(torch.promote_types(torch.float32, x.dtype))", "return x"),
            (MEMORY, "    _refuse_16_bit(initial)\n", ""),
        ],
        [f"{LAYER}the_memory_is_fp32_under_bf16", f"{LAYER}a_16_bit_memory_is_refused", f"{LAW}a_16_bit_memory_is_refused"],
    ),
    "memory-under-autocast": (
        [(ATTENTION, "with torch.autocast(x.device.type, enabled=False):", "if True:")],
        [f"{LAYER}the_memory_is_fp32_under_bf16"],
    ),
    # Files.
    "nan-in-weights-taken": (
        [(CHECKPOINT, "if not torch.isfinite(tensor).all():", "if False:")],
        ["tests/model/test_checkpoint.py::test_weights_that_are_no_numbers"],
    ),
    # The oracle and the committed numbers are watched too.
    "reference-gate-flipped": (
        [(REFERENCE, "memory_weight * memory_output + (1 - memory_weight)", "(1 - memory_weight) * memory_output + memory_weight")],
        [f"{PAPER}gate_is_equation_6_with_its_sign", f"{PAPER}whole_layer_as_matrices"],
    ),
    "reference-reads-after-writing-z": (
        [(REFERENCE, "v_old = torch.zeros_like(v[t]) if empty else (key_features[t] @ M) / (key_features[t] @ z)", "v_old = torch.zeros_like(v[t]) if empty else (key_features[t] @ M) / (key_features[t] @ z_new)")],
        [f"{PAPER}updates_are_equations_4_and_5", f"{PAPER}whole_layer_as_matrices"],
    ),
    "both-gates-flipped": (
        [
            (REFERENCE, "memory_weight * memory_output + (1 - memory_weight)", "(1 - memory_weight) * memory_output + memory_weight"),
            (
                MEMORY,
                "memory_weight * memory_output + (1 - memory_weight) * local_output",
                "memory_weight * local_output + (1 - memory_weight) * memory_output",
            ),
        ],
        ["tests/golden/test_golden.py::test_logits_are_those_committed", f"{LAW}gate_limits_and_sign"],
    ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, request):
    """What became of every sabotage that is asked for, and of the library as it is."""
    asked = {item.callspec.params["name"] for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")}
    jobs = [(name, edits, tests) for name, (edits, tests) in SABOTAGES.items() if name in asked]
    every = sorted({test for _, _, tests in jobs for test in tests})
    work = tmp_path_factory.mktemp("sabotage")
    found = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("forks.py"))],
        input=json.dumps({"root": str(ROOT), "work": str(work), "jobs": [("as-it-is", [], every), *jobs]}),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout)


@pytest.mark.parametrize("name", SABOTAGES)
def test_turns_the_suite_red(name, outcomes):
    found = outcomes[name]
    assert "error" not in found, found["error"]
    named = {test.split("[")[0] for test in SABOTAGES[name][1]}
    assert found["code"] in (0, 1), "a test that is named here is not there"
    assert set(found["red"]) == named, f"still green: {sorted(named - set(found['red']))}"


def test_as_it_is_all_of_them_are_green(outcomes):
    found = outcomes["as-it-is"]
    assert "error" not in found, found["error"]
    assert found["code"] == 0 and not found["red"]
