"""A whole program walked beside the PyTorch model: same checkpoint, same steps, same caches; how far apart they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import onnx
import torch
from tests.gpu.judge import judge
from tests.support.graph_walker import Place, Walker
from tests.support.kernel_cases import packed_index, packed_latents
from torch import Tensor

from seekforge.common.dtypes import FROM_ONNX
from seekforge.exporter.builder.tensorrt.graph import prepare, wide_weights
from seekforge.exporter.builder.tensorrt.passes.bf16_linears import bf16_linear_weights
from seekforge.exporter.builder.tensorrt.passes.join_linears import join_linears
from seekforge.exporter.builder.tensorrt.passes.nvfp4_experts import nvfp4_recipes
from seekforge.exporter.models import family_of
from seekforge.exporter.models.shared.session import TorchSession
from seekforge.exporter.models.shared.settings import Settings
from seekforge.exporter.models.shared.weights import to_torch
from seekforge.exporter.parity.compare.metrics import compare_logits
from seekforge.exporter.parity.gates import KL, NOISE_FACTOR, TOP1
from seekforge.formats.checkpoint.model_config import ModelConfig
from seekforge.formats.numerics import numerics_from_dict
from seekforge.formats.program import Program, load_bindings, load_program
from seekforge.formats.step_io import StepInputs
from seekforge.formats.weight_recipes import TensorSource, cast, evaluate, retarget
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.kernels.index import KERNELS, kernel_sm, read_index
from seekforge.plugins.kernels.launcher import KernelFolder
from seekforge.plugins.kernels.sizes import operators
from seekforge.plugins.kernels.sm_limits import has_fp8
from seekforge.plugins.quant import latent_record_bytes
from seekforge.plugins.registry import OPERATORS, SPECS
from seekforge.plugins.testing import Case, calc_diff

KvFormat = Literal["bf16", "fp8_ds"]

#: Share of the embeddings whose last bf16 bit is flipped to measure noise, and how often.
FLIPPED, TRIALS = 0.3, 12
#: calc_diff of a layer's output in two runs of the same precision (spec §11).
LAYER_DIFF: Final = 1e-5


def kernel_ops(program: Program, kv_format: KvFormat, *, nvfp4_experts: bool = False) -> dict[str, dict[str, Any]]:
    """Return op_type -> sizes and attributes of the kernels that a program's engines need."""
    config = ModelConfig.parse(program.config, "program")
    needed = operators(config, kv_format=kv_format, numerics=program.numerics, nvfp4_experts=nvfp4_experts)
    return {op: bound for op, bound in needed.items() if op in program.ops or not OPERATORS[op].in_programs}


def specialization(sm: int, kv_format: KvFormat) -> Specialization:
    """Return what a GPU target of this SM runs: bf16, FP8 weights as float8 or as bytes."""
    return Specialization("bf16", "float8" if has_fp8(sm) else "int8", kv_format, "trt")


@dataclass(frozen=True)
class Compared:
    """How far the walk is from PyTorch.

    Attributes:
        hidden: calc_diff of the hidden states behind the last layer, real rows only.
        kl: mean KL of the next token.
        top1: the share of rows with the same most likely token.
        keys: how many rows chose other keys, of all rows of all layers.
        experts: how many rows chose other experts, of all rows of all layers.
        rows: how many rows the step has.
    """

    hidden: float
    kl: float
    top1: float
    keys: int
    experts: int
    rows: int

    def within(self, noise: Sequence[Compared], num_layers: int) -> bool:
        """Whether the two agree as two runs of the same precision must (spec §11), or as PyTorch does with itself.

        Args:
            noise: PyTorch against itself with the last bit of some embeddings flipped, as the kernels' other order
                of sums flips last bits: one FP8 rounding or one choice that flips then moves a row for good.
            num_layers: how many layers the program has; hidden states are compared behind the last.
        """
        flips = max((one.keys + one.experts for one in noise), default=0)
        return (
            self.hidden <= max([LAYER_DIFF * num_layers, *(NOISE_FACTOR * one.hidden for one in noise)])
            and self.kl <= max([KL, *(NOISE_FACTOR * one.kl for one in noise)])
            and self.top1 >= min([TOP1, *(one.top1 - 1 / self.rows for one in noise)])
            and self.keys + self.experts <= NOISE_FACTOR * flips + 1
        )

    def __str__(self) -> str:
        return (
            f"hidden {self.hidden:.1e}, KL {self.kl:.1e}, top-1 {self.top1:.0%}, other keys in {self.keys} and "
            f"other experts in {self.experts} rows of {self.rows}"
        )


class WrongNode(AssertionError):
    """A custom node that is wrong, by its own inputs."""


def judge_node(name: str, plugin: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Compare a custom node with its operator's reference on the very same inputs.

    Raises:
        WrongNode: it differs by more than the operator's tolerance.
    """
    case = Case(plugin.spec.name, name, tuple(inputs), plugin.attrs)
    right, error = judge(case, outputs, case.expected())
    if not right:
        raise WrongNode(f"{name}: {error}")


class Walk:
    """A walker and a PyTorch session over one checkpoint and program.

    Args:
        source: the checkpoint; must stay open.
        program: the folder of the canonical program.
        engine: the folder whose `kernels/` has the launch descriptors.
        place: where the program is walked; PyTorch runs on the CPU.
        kv_format: the format of the walker's caches.
        num_blocks: the size of the paged caches.
        nvfp4_experts: whether the walker has its experts in NVFP4.
        trt: the module of plugin classes, as `Walker` takes it.
    """

    def __init__(
        self,
        source: TensorSource,
        program: Path,
        engine: Path,
        place: Place,
        *,
        kv_format: KvFormat,
        num_blocks: int,
        nvfp4_experts: bool = False,
        trt: Any = None,
    ) -> None:
        loaded = load_program(program)
        self.config = ModelConfig.parse(loaded.config, str(program))
        self.place, self.kv_format, self.num_blocks = place, kv_format, num_blocks
        sm = kernel_sm(place.sm)
        how = specialization(sm, kv_format)
        digests = {one["op"]: one["digest"] for one in read_index(engine / KERNELS) if one["sm"] == sm}
        graphs = {"model": onnx.load(program / loaded.graphs["model"].file)}
        loaded, graphs, bindings = join_linears(loaded, graphs, load_bindings(program), self.config)
        graph, recipes = graphs["model"], bindings["model"]
        prepared = prepare(
            graph,
            how,
            self.config,
            plugins=list(SPECS),
            products="fp8" if has_fp8(sm) else "bf16",
            digests=digests,
            weights=recipes,
            bf16_linears=bf16_linear_weights(graph, wide_weights(graph, recipes)),
            nvfp4_experts=nvfp4_experts,
        )
        if nvfp4_experts:
            recipes = recipes | nvfp4_recipes(graph, recipes)
        types = {value.name: FROM_ONNX[value.type.tensor_type.elem_type] for value in prepared.model.graph.input}
        weights = {}
        for name, recipe in recipes.items():
            recipe = retarget(recipe, activations=how.activations, fp8_dtype=how.fp8_dtype)
            recipe = cast(recipe, "f32") if types[name] == "f32" else recipe
            weights[name] = to_torch(evaluate(recipe, source)).to(place.device)
        kernels = KernelFolder(engine, place.sm, place.driver)
        self.walker = Walker(prepared.model, weights, place, kernels, trt=trt)
        settings = Settings(self.config, numerics_from_dict(loaded.numerics), "bf16")
        self.session = TorchSession(settings, source, num_blocks, layer_range=loaded.layer_range)
        self.caches = self.new_caches()

    def new_caches(self) -> dict[str, Tensor]:
        """Return zeroed caches of the walker, by input name."""
        config, caches = self.config, {}
        record = latent_record_bytes(config.kv_lora_rank, config.qk_rope_head_dim)
        for i in self.session.module().layer_numbers:
            for kind, wide in family_of(config).caches(config, i).items():
                shape, dtype = (self.num_blocks * 64, wide), torch.bfloat16
                if self.kv_format == "fp8_ds":
                    packed = (64, record) if kind == "latent_cache" else (64 * 132,)
                    shape, dtype = (self.num_blocks, *packed), torch.int8
                caches[f"{kind}.{i}"] = self.place.empty(shape, dtype).zero_()
        return caches

    def take_caches(self) -> None:
        """Copy PyTorch's caches into the walker's, in the walker's format."""
        for name, cache in self.caches.items():
            rows = self.session.caches[name]
            if self.kv_format == "fp8_ds":
                is_latent = name.startswith("latent_cache")
                rows = packed_latents(rows, self.config.kv_lora_rank) if is_latent else packed_index(rows)
            cache.copy_(rows)

    def inputs(self, step: StepInputs) -> dict[str, Tensor]:
        """Return a step's graph inputs on the place's device, caches included."""
        others = self.caches.keys() | self.walker.weights.keys() | self.walker.constants.keys()
        names = [name for name in self.walker.inputs if name not in others]
        return {name: torch.from_numpy(step.array(name)).to(self.place.device) for name in names} | self.caches

    def step(self, step: StepInputs) -> Compared:
        """Run one step on both sides. Every custom node is judged by its own inputs; then the results are compared.

        Raises:
            WrongNode: a node differs from its operator's reference by more than its tolerance.
        """
        results = self.walker.run(self.inputs(step), judge_node)
        return self.compare(step, results, self.session.run(step))

    def noise(self, step: StepInputs, trials: int = TRIALS) -> list[Compared]:
        """Compare PyTorch with itself on `step`, before it has run, with perturbed embeddings."""
        session = self.session
        before = session.caches
        draw = torch.Generator().manual_seed(0)

        def perturb(module: torch.nn.Module, args: Any, embedded: Tensor) -> Tensor:
            flip = torch.rand(embedded.shape, generator=draw) < FLIPPED
            return (embedded.view(torch.int16) ^ flip.to(torch.int16)).view(torch.bfloat16)

        expected = session.run(step)
        hook = session.module().token_embedding().register_forward_hook(perturb)
        runs = []
        for _ in range(trials):
            session.caches = before
            runs.append(self.compare(step, session.run(step), expected))
        hook.remove()
        session.caches = before
        return runs

    def compare(self, step: StepInputs, results: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Compared:
        """Compare the outputs of one step, padded rows left out."""
        real = torch.from_numpy(step.positions >= 0)
        logits = compare_logits(
            results["logits"].cpu().numpy(), expected["logits"].numpy(), np.full(len(step.logits_index), -1)
        )
        flips = {"topk_indices": 0, "expert_ids": 0}
        for name, selection in expected.items():
            kind = name.partition(".")[0]
            if kind in flips:
                pair = (one.cpu().view(*real.shape, -1)[real].sort().values for one in (results[name], selection))
                flips[kind] += int(torch.ne(*pair).any(-1).sum())
        return Compared(
            hidden=calc_diff(results["hidden"].cpu()[real], expected["hidden"][real]),
            kl=float(logits.kl.mean()),
            top1=float(logits.top1.mean()),
            keys=flips["topk_indices"],
            experts=flips["expert_ids"],
            rows=int(real.sum()),
        )


def same_outputs(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Sequence[str]) -> list[str]:
    """Return the names of outputs whose bytes differ."""

    def raw(tensor: Tensor) -> Tensor:
        return tensor.cpu().contiguous().view(-1).view(torch.uint8)

    return [name for name in names if not torch.equal(raw(a[name]), raw(b[name]))]
