"""Plans cut sequences into steps without losing a token; dumps give back what was written and refuse damage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from seekforge.common.errors import ConfigError
from seekforge.formats import dump as dump_format
from seekforge.formats.dump import INDEX, Dump, DumpWriter, Side
from seekforge.formats.parity_steps import MODES, ParitySteps, chunks, make_plan, step_inputs

SIDE = Side(kind="torch", name="a", numerics={}, activations="f32", layers=(0, 2), config={}, versions={})


def plan(*contexts: int, modes: tuple[str, ...] = MODES) -> ParitySteps:
    return make_plan(contexts=contexts, vocab_size=1024, index_topk=64, has_mtp=True, modes=modes)  # pyright: ignore


@pytest.mark.parametrize("length", (1, 2, 5, 63, 64, 65, 130, 700))
@pytest.mark.parametrize("mode", MODES)
def test_chunks_cover_the_sequence(mode: str, length: int) -> None:
    if mode == "mtp" and length == 1:
        return  # make_plan leaves it out: there is no next token
    sizes = chunks(mode, length, 64)  # pyright: ignore
    assert sum(sizes) == length - (mode == "mtp") and min(sizes) >= 1
    if mode == "chunked" and length >= 128:
        assert sizes[0] == 64  # a border at index_topk


@pytest.mark.parametrize("context", (1, 3, 64, 65, 200))
def test_steps_write_each_token_once_to_its_own_slot(context: int) -> None:
    whole = plan(context)
    for case in whole.cases:
        written: dict[tuple[str, int], int] = {}
        seen: dict[int, int] = {}
        for step in case.steps:
            arrays = step_inputs(case, step)
            slots = arrays.slot_mapping[arrays.slot_mapping >= 0]
            assert (slots >= 64).all() and (slots < case.num_blocks * 64).all()
            for slot in slots.tolist():
                assert (step.graph, slot) not in written
                written[step.graph, slot] = 1
            assert arrays.real.sum() == sum(len(new) for new in step.tokens)
            assert arrays.real[arrays.logits_index].all()
            if step.graph == "model":
                for sequence, new in zip(step.sequences, step.tokens, strict=True):
                    seen[sequence] = seen.get(sequence, 0) + len(new)
        assert max(seen.values()) == context - (case.mode == "mtp")


def test_an_mtp_step_is_one_token_ahead_of_the_step_before_it() -> None:
    case = plan(20, modes=("mtp",)).cases[0]
    model = [token for step in case.steps if step.graph == "model" for token in step.tokens[0]]
    ahead = [token for step in case.steps if step.graph == "mtp" for token in step.tokens[0]]
    assert model[1:] == ahead[:-1] and len(model) == len(ahead) == 19
    assert [step.graph for step in case.steps] == ["model", "mtp"] * (len(case.steps) // 2)


def test_large_vocabularies_keep_fewer_rows_of_logits() -> None:
    large = make_plan(contexts=(2048,), vocab_size=129280, index_topk=2048, has_mtp=False, modes=("whole",))
    rows = large.cases[0].steps[0].logits_index
    assert 100 < len(rows) < 200 and rows[0] == 0 and rows[-1] == 2047


def test_prompts_are_run_as_they_are() -> None:
    made = make_plan(
        contexts=(), vocab_size=1024, index_topk=64, has_mtp=False, modes=("whole",), prompts=[[7, 8, 9], [5]]
    )
    assert [step.tokens for _, _, step in made.steps()] == [((7, 8, 9),), ((5,),)]


def test_a_plan_without_cases_is_refused() -> None:
    with pytest.raises(ConfigError, match="the plan is empty"):
        plan(2, modes=("ragged",))


def written(folder: Path) -> tuple[Dump, dict[str, np.ndarray]]:
    writer = DumpWriter(folder, SIDE, plan(9, modes=("ragged",)))
    rng = np.random.default_rng(0)
    tensors = {
        "logits": rng.standard_normal((4, 8), np.float32),
        "attn_out.0": rng.standard_normal((3, 6, 8), np.float32),
        "expert_ids.1": rng.integers(0, 9, (18, 4)).astype(np.int32),
        "empty.1": np.zeros((0, 3), np.float32),
    }
    writer.write(0, {name: tensors[name] for name in ("logits", "attn_out.0")})
    writer.write(0, {name: tensors[name] for name in ("expert_ids.1", "empty.1")})  # layer by layer
    writer.close()
    return Dump.open(folder), tensors


def test_a_dump_gives_back_what_was_written(tmp_path: Path) -> None:
    dump, tensors = written(tmp_path)
    assert dump.side == SIDE and sorted(dump.names(0)) == sorted(tensors) and dump.names(1) == []
    for name, value in tensors.items():
        assert np.array_equal(dump.tensor(0, name), value) and dump.tensor(0, name).dtype == value.dtype
    real = dump.arrays(0).real
    assert dump.rows(0, "attn_out.0").shape == (real.sum(), 8)
    assert np.array_equal(dump.rows(0, "expert_ids.1"), tensors["expert_ids.1"][real])


def test_a_file_s_header_is_read_once_for_all_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = plan(5, modes=("whole",))
    writer = DumpWriter(tmp_path, SIDE, one)
    writer.write(0, {f"{name}.0": np.full((5, 2), i, np.float32) for i, name in enumerate("abc")})
    writer.close()
    parsed: list[object] = []
    read = dump_format.parse_json
    monkeypatch.setattr(dump_format, "parse_json", lambda text: parsed.append(text) or read(text))
    dump = Dump.open(tmp_path)
    for _ in range(2):
        assert [int(dump.rows(0, f"{name}.0")[0, 0]) for name in "abc"] == [0, 1, 2]
    assert len(parsed) == 1


def test_files_are_safetensors(tmp_path: Path) -> None:
    safe_open = pytest.importorskip("safetensors").safe_open
    dump, tensors = written(tmp_path)
    path = next(tmp_path.glob("00000-0-*.safetensors"))
    with safe_open(path, framework="numpy") as file:
        assert np.array_equal(file.get_tensor("attn_out.0"), tensors["attn_out.0"])
    assert dump.has(0, "attn_out.0", "logits") and not dump.has(0, "attn_out.1")


def test_damage_is_named(tmp_path: Path) -> None:
    dump, _ = written(tmp_path)
    with pytest.raises(ConfigError, match=r"no tensor 'attn_out\.7'; make the dump again with taps"):
        dump.tensor(0, "attn_out.7")
    path = next(tmp_path.glob("00000-0-*.safetensors"))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ConfigError, match="cannot be read"):
        dump.tensor(0, "attn_out.0")
    path.unlink()
    with pytest.raises(ConfigError, match="copy the dump again"):
        dump.tensor(0, "attn_out.0")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "written by 'seekforge parity --save'"),
        ("{", "not valid JSON"),
        ("[]", "dump format None"),
        ('{"format": 99}', "dump format 99"),
        ('{"format": 1}', "key 'side'"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / INDEX).write_text(content)
    with pytest.raises(ConfigError, match=words):
        Dump.open(tmp_path)


def test_an_index_of_another_number_of_steps_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    raw = json.loads((tmp_path / INDEX).read_text())
    raw["tensors"].pop()
    (tmp_path / INDEX).write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="steps listed"):
        Dump.open(tmp_path)
