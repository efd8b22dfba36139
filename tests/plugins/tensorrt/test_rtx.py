"""TensorRT-RTX builds the `trt` bodies of every operator, inlined, without a plugin and without a GPU.

"Builds" is parse and plan; nothing runs here. Numbers of the same bodies are checked in ONNX Runtime.
"""

from __future__ import annotations

from typing import Any

import onnx
import pytest

from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.testing import check_body, one_node_model

Type = tuple[str, list[int | str]]

#: Symbolic size -> what the profile allows: least, typical, most.
SIZES = {"B": (1, 2, 8), "Q": (1, 4, 512), "MB": (1, 16, 2560), "NS": (128, 4096, 65536), "T": (1, 8, 512)}


def described(op: str, how: Specialization) -> tuple[dict[str, Any], list[Type], list[Type]]:
    """Attributes, inputs and outputs of one operator at the widths of DeepSeek-V3.2."""
    act, kv, fp8 = how.activations, how.kv_format, how.fp8_dtype
    latent: Type = (kv, ["NS", 576])
    index: Type = (kv, ["NS", 128])
    table: Type = ("i32", ["B", "MB"])
    match op:
        case "BlockFp8Linear":
            inputs = [(act, ["B", "Q", 7168]), (fp8, [2112, 7168]), ("f32", [17, 56])]
            return {"act_quant": "ue8m0"}, inputs, [(act, ["B", "Q", 2112])]
        case "Bf16Linear":
            return {}, [(act, ["B", "Q", 7168]), (act, [256, 7168])], [("f32", ["B", "Q", 256])]
        case "DsaCacheWrite":
            new: list[Type] = [(act, ["B", "Q", n]) for n in (512, 64, 128)]
            attrs = {"kv_format": kv, "index_format": kv, "kv_fp8": True, "indexer_fp8": True}
            return attrs, [latent, index, *new, ("i64", ["B", "Q"])], [latent, index]
        case "MlaCacheWrite":
            new = [(act, ["B", "Q", n]) for n in (512, 64)]
            return {"kv_format": kv, "kv_fp8": True}, [latent, *new, ("i64", ["B", "Q"])], [latent]
        case "DsaIndexer":
            q: list[Type] = [(act, ["B", "Q", 64, 128]), ("f32", ["B", "Q", 64])]
            attrs = {"index_topk": 2048, "indexer_fp8": True, "index_format": kv}
            return attrs, [*q, index, table, ("i64", ["B", "Q"])], [("i32", ["B", "Q", 2048])]
        case "DsaAttention":
            q = [(act, ["B", "Q", 128, 512]), (act, ["B", "Q", 128, 64])]
            attrs = {"scale": 0.1352337788608801, "kv_format": kv}
            return attrs, [*q, latent, table, ("i32", ["B", "Q", 2048])], [(act, ["B", "Q", 128, 512])]
        case "MlaAttention":
            q = [(act, ["B", "Q", 128, 512]), (act, ["B", "Q", 128, 64])]
            attrs = {"scale": 0.1352337788608801, "kv_format": kv}
            return attrs, [*q, latent, table, ("i64", ["B", "Q"])], [(act, ["B", "Q", 128, 512])]
        case "MoeRoute":
            attrs = {"n_group": 8, "topk_group": 4, "top_k": 8, "norm": True, "scale": 2.5}
            return attrs, [("f32", ["T", 256]), ("f32", [256])], [("i32", ["T", 8]), ("f32", ["T", 8])]
        case _:
            weights: list[Type] = [
                (fp8, [256, 4096, 7168]), ("f32", [256, 32, 56]), (fp8, [256, 7168, 2048]), ("f32", [256, 56, 16]),
            ]  # fmt: skip
            routed: list[Type] = [("i32", ["T", 8]), ("f32", ["T", 8])]
            return {"act_quant": "ue8m0"}, [(act, ["T", 7168]), *routed, *weights], [("f32", ["T", 7168])]


def build(model: onnx.ModelProto, inputs: dict[str, list[int | str]], targets: list[str]) -> int:
    """Parse and build; returns the plan's size.

    Raises:
        RuntimeError: with TensorRT's messages.
    """
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        raise RuntimeError([parser.get_error(i).desc() for i in range(parser.num_errors)])
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(targets)
    for i, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target), i)
    profile = builder.create_optimization_profile()
    for name, shape in inputs.items():
        if any(isinstance(dim, str) for dim in shape):
            bounds = [[SIZES[dim][i] if isinstance(dim, str) else dim for dim in shape] for i in range(3)]
            profile.set_shape(name, *bounds)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(logger.errors)
    return plan.nbytes


OPS = [
    "BlockFp8Linear", "Bf16Linear", "DsaCacheWrite", "DsaIndexer", "DsaAttention", "MlaCacheWrite",
    "MlaAttention", "MoeRoute", "MoeExperts",
]  # fmt: skip
#: MoeExperts has no float8 body: TensorRT takes no float8 in a loop.
FORMS = [(op, storage) for op in OPS for storage in ("int8", "float8") if (op, storage) != ("MoeExperts", "float8")]
TYPES = [("f32", "f32"), ("f32", "bf16"), ("bf16", "bf16")]


@pytest.mark.parametrize(("activations", "kv"), TYPES, ids=["f32", "f32-over-bf16-caches", "bf16"])
@pytest.mark.parametrize(("op", "storage"), FORMS)
def test_body_builds(op: str, activations: str, kv: str, storage: str) -> None:
    """One plan for SM80, SM89 and SM120 with int8 storage; SM80 has no float8."""
    how = Specialization(activations, storage, kv, "trt")  # pyright: ignore[reportArgumentType]
    attrs, inputs, outputs = described(op, how)
    model = one_node_model(op, attrs, how, inputs, outputs)
    shapes = {value.name: shape for value, (_, shape) in zip(model.graph.input, inputs, strict=True)}
    targets = ["SM89", "SM120"] if storage == "float8" else ["SM80", "SM89", "SM120"]
    plan_bytes = build(check_body(model), shapes, targets)
    assert plan_bytes < 16 << 20, "a plan holds no weights"


def test_float8_storage_does_not_build_for_sm80() -> None:
    """The reason for fp8_storage=int8; should this start to build, the rule can go."""
    how = Specialization("f32", "float8", "f32", "trt")
    attrs, inputs, outputs = described("BlockFp8Linear", how)
    model = one_node_model("BlockFp8Linear", attrs, how, inputs, outputs)
    shapes = {value.name: shape for value, (_, shape) in zip(model.graph.input, inputs, strict=True)}
    with pytest.raises(RuntimeError, match="fp8_e4m3"):
        build(check_body(model), shapes, ["SM80"])
