"""An engine on a real GPU answers as PyTorch does; what judges it is tried here on engines that are known to be right.

The device test builds the tiny model for the GPU that is there, with the kernels of its plugins, and loads it through
`LLM`. It is skipped, and says why, where there is no GPU or no target that its library compiles for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from tests.support.build_options import gpu_options

from seekforge.common.cli.console import Stages
from seekforge.exporter.builder.tensorrt.build import build_gpu
from seekforge.exporter.builder.tensorrt.check import check, open_inputs
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.program.export import export
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.checkpoint.safetensors import Checkpoint
from seekforge.formats.numerics import NUMERICS
from seekforge.formats.parallelism import Parallelism
from seekforge.formats.targets import TargetConfig, all_targets
from seekforge.runtime import LLM, Engine, SamplingParams

#: Gives the logits after each of some token ids, [len, vocab_size].
Oracle = Callable[[Sequence[int]], np.ndarray]


def judge(
    engine: Engine | Path, oracle: Oracle, vocab_size: int, *, drafts: int, tolerance: float, most_wrong: float = 0.0
) -> float:
    """Generate greedily and hold every token against the oracle, given the tokens before it.

    A token is wrong if the oracle likes another one better by more than `tolerance`. Prompts end below, at and above a
    block's border, and run together and again from the prefix cache.

    Args:
        engine: to be judged.
        oracle: knows what is right.
        vocab_size: of the oracle.
        drafts: tokens to draft.
        tolerance: in logits.
        most_wrong: share of the tokens that may be wrong.

    Returns:
        The share of the tokens for which there was no choice, since the oracle's best leads by more than `tolerance`.
    """
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, vocab_size, length).tolist() for length in (1, 17, 63, 64, 65, 90)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    decided: list[bool] = []
    wrong: list[str] = []
    with LLM(engine, num_blocks=40, num_speculative_tokens=drafts, speculation_off_switch=False) as llm:
        for _ in range(2):
            for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
                tokens = output.outputs[0].token_ids
                assert len(tokens) == params.max_tokens
                rows = oracle([*prompt, *tokens])[len(prompt) - 1 : -1]
                for place, (token, row) in enumerate(zip(tokens, rows, strict=True)):
                    second, best = np.sort(row)[-2:]
                    decided.append(best - second > tolerance)
                    if row[token] < best - tolerance:
                        wrong.append(f"token {place} after a prompt of {len(prompt)}: {best - row[token]:.3g} below")
        assert llm._scheduler.cache.pool.num_free == llm._scheduler.cache.pool.num_usable
    assert len(wrong) <= most_wrong * len(decided), f"{len(wrong)} of {len(decided)} are wrong, first {wrong[0]}"
    return sum(decided) / len(decided)


def pytorch(checkpoint: Path) -> tuple[Oracle, int, float]:
    """Return PyTorch's FP8 model with bf16 activations, its vocabulary, and a tolerance.

    It is twice what rounding the activations to bf16 changes in the middle row. Where the rounding makes a row choose
    other experts or keys it changes more: such rows are the few that may be wrong.
    """
    config = ModelConfig.load(checkpoint)

    def logits(ids: Sequence[int], activations: Literal["f32", "bf16"]) -> np.ndarray:
        with Checkpoint.open(checkpoint) as source:
            session = TorchSession(Settings(config, NUMERICS["fp8"], activations), source)
            return session.prefill(list(ids))["logits"].double().numpy()

    ids = np.random.default_rng(1).integers(2, config.vocab_size, 80).tolist()
    noise = float(np.median(np.abs(logits(ids, "bf16") - logits(ids, "f32")).max(1)))
    return lambda ids: logits(ids, "bf16"), config.vocab_size, 2 * noise


def target_for(sm: int, backend: str) -> TargetConfig | None:
    """Return a target that `backend` compiles for a GPU of this compute capability."""
    return next((one for one in all_targets() if one.backend == backend and sm in one.sms), None)


def gpu_sm(num_gpus: int = 1) -> int:
    """Return the compute capability of the first GPU, or skip the test where there are fewer than so many."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        (status,) = driver.cuInit(0)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no CUDA driver ({error})")
    if status != driver.CUresult.CUDA_SUCCESS or driver.cuDeviceGetCount()[1] == 0:
        pytest.skip(f"no GPU ({status.name})")
    if driver.cuDeviceGetCount()[1] < num_gpus:
        pytest.skip(f"{driver.cuDeviceGetCount()[1]} GPUs, this takes {num_gpus}")
    kind = driver.CUdevice_attribute
    major, minor = (
        driver.cuDeviceGetAttribute(one, 0)[1]
        for one in (
            kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return 10 * major + minor


@pytest.mark.parametrize(
    ("sm", "backend", "name"),
    [
        (90, "tensorrt", "h100"),
        (80, "tensorrt", "a100-80g"),
        (89, "tensorrt-rtx", "rtx4090"),
        (120, "tensorrt-rtx", "rtx5090"),
        (90, "tensorrt-rtx", None),
        (75, "tensorrt", None),
    ],
)
def test_a_gpu_gets_a_target_that_its_library_compiles_for(sm: int, backend: str, name: str | None) -> None:
    found = target_for(sm, backend)
    assert (found.sms if found else None) == (next(t.sms for t in all_targets() if t.name == name) if name else None)


@pytest.mark.parametrize("drafts", [0, 2])
def test_the_judge_passes_a_right_engine_and_fails_a_wrong_oracle(gpu_engine, device, toy, drafts: int) -> None:
    def right(ids: Sequence[int]) -> np.ndarray:
        return np.stack([toy.logits(list(ids[: n + 1])) for n in range(len(ids))])

    def bent(ids: Sequence[int]) -> np.ndarray:
        """The first token is forgotten."""
        return np.stack([toy.logits(list(ids[1 : n + 1]) or list(ids[:1])) for n in range(len(ids))])

    assert judge(gpu_engine[0], right, 300, drafts=drafts, tolerance=1e-3) > 0.9
    assert device.launches > 5, "decode steps are captured graphs"
    with pytest.raises(AssertionError, match="are wrong, first token"):
        judge(gpu_engine[0], bent, 300, drafts=drafts, tolerance=1e-3)


@pytest.mark.slow
def test_the_judge_passes_the_engine_of_a_cpu(tiny_engines: dict[str, Path], tiny_checkpoint: Path) -> None:
    oracle, vocab_size, tolerance = pytorch(tiny_checkpoint)
    assert judge(tiny_engines["fp8"], oracle, vocab_size, drafts=2, tolerance=tolerance, most_wrong=0.05) > 0.2


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("library", "backend"),
    [pytest.param("tensorrt", "tensorrt", marks=pytest.mark.trt), ("tensorrt_rtx", "tensorrt-rtx")],
)
@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("most_layers", [1, 4], ids=["a plan per kind of layer", "one plan"])
def test_a_real_gpu_answers_as_pytorch_does(
    request: pytest.FixtureRequest, tmp_path: Path, library: str, backend: str, drafts: int, most_layers: int
) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed")
    sm = gpu_sm()
    target = target_for(sm, backend)
    if target is None:
        pytest.skip(f"no target of {backend} for a GPU of sm{sm}")
    checkpoint = request.getfixturevalue("tiny_checkpoint")
    inputs = open_inputs(request.getfixturevalue("tiny_programs")["fp8"], checkpoint)
    options = gpu_options(layers_per_engine=most_layers)
    out, progress = tmp_path / "engine", Stages(quiet=True)
    build_gpu(inputs, check(inputs, target, options), out, options=options, force=False, progress=progress)
    oracle, vocab_size, tolerance = pytorch(checkpoint)
    assert judge(out, oracle, vocab_size, drafts=drafts, tolerance=tolerance, most_wrong=0.05) > 0.2


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("library", "backend"),
    [pytest.param("tensorrt", "tensorrt", marks=pytest.mark.trt), ("tensorrt_rtx", "tensorrt-rtx")],
)
@pytest.mark.parametrize(
    "layout", [Parallelism(tp=2, ep=True), Parallelism(pp=2), Parallelism(tp=2, pp=2, ep=True)], ids=str
)
def test_several_real_gpus_answer_as_pytorch_does(
    request: pytest.FixtureRequest, tmp_path: Path, library: str, backend: str, layout: Parallelism
) -> None:
    """Sums go through NCCL inside of plans, also of captured steps; stages over the host. `make gpu-check` runs it."""
    pytest.importorskip(library, reason=f"{library} is not installed")
    if layout.tp > 1:
        pytest.importorskip("nccl.core", reason="nccl4py is not installed")
    sm = gpu_sm(layout.num_ranks)
    target = target_for(sm, backend)
    if target is None:
        pytest.skip(f"no target of {backend} for a GPU of sm{sm}")
    checkpoint = request.getfixturevalue("tiny_checkpoint")
    export(checkpoint, tmp_path / "program", numerics=NUMERICS["fp8"], parallelism=layout)
    inputs = open_inputs(tmp_path / "program", checkpoint)
    options, out = gpu_options(), tmp_path / "engine"
    build_gpu(inputs, check(inputs, target, options), out, options=options, force=False, progress=Stages(quiet=True))
    oracle, vocab_size, tolerance = pytorch(checkpoint)
    assert judge(out, oracle, vocab_size, drafts=2, tolerance=tolerance, most_wrong=0.05) > 0.2
