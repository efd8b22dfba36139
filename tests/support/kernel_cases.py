"""The operators' vectors in the types of a GPU target: bf16 activations, bf16 or fp8_ds caches."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.kernels.kernel_set import Image, KernelSet, Param, Resources, argument_code
from seekforge.plugins.kernels.launch_plan import Buffer, Scalar, op_kernels
from seekforge.plugins.operator import Arg, OpSpec, evaluate_dim
from seekforge.plugins.quant import pack_latent, quantize
from seekforge.plugins.registry import SPECS
from seekforge.plugins.testing import Case, calc_diff, kernel_cases

#: FlashMLA's values are normal / 10 and its absolute error 1e-3; ours are normal.
ABSOLUTE, RELATIVE, DIFF = 1e-2, 2.01 / 128, 5e-6

HOW = Specialization("bf16", "float8", "bf16", "trt")


def gpu_cases(op: str) -> list[Case]:
    """Return the vectors of an operator with bf16 activations and caches."""
    return [case.typed(HOW) for case in kernel_cases(op)]


def close(actual: Tensor, expected: Tensor) -> bool:
    """FlashMLA's gate of sparse decode: each element within an absolute or a relative error, and all of them together.

    For attention in the latent space, sparse or dense. Places that are not finite must be the same.
    """
    x, y = actual.double(), expected.double()
    finite = y.isfinite()
    if not torch.equal(finite, x.isfinite()):
        return False
    x, y = x[finite], y[finite]
    error = (x - y).abs()
    return bool(((error < ABSOLUTE) | (error < RELATIVE * y.abs())).all()) and calc_diff(x, y) <= DIFF


def packed_latents(cache: Tensor, latent_dim: int) -> Tensor:
    """Return fp8_ds records [NB, 64, bytes] of latents [NB·64, C + R]."""
    records = pack_latent(cache[:, :latent_dim].float(), cache[:, latent_dim:].float())
    return records.view(-1, 64, records.shape[-1])


def packed_index(cache: Tensor) -> Tensor:
    """Return fp8_ds pages [NB, 64·132] of index keys [NB·64, 128]."""
    q, scale = quantize(cache.float())
    values = q.view(torch.int8).view(-1, 64 * 128)
    return torch.cat([values, scale.contiguous().view(torch.int8).view(-1, 64 * 4)], dim=1)


def _cache_write(case: Case, kv_format: str) -> Case | None:
    latent, index, c, k_pe, key, slots = case.inputs
    if kv_format == "fp8_ds":
        if not case.attrs["kv_fp8"]:
            return None
        latent, index = packed_latents(latent, c.shape[-1]), packed_index(index)
    attrs = case.attrs | {"kv_format": kv_format, "index_format": kv_format}
    return dataclasses.replace(case, inputs=(latent, index, c, k_pe, key, slots), attrs=attrs)


def _latent_write(case: Case, kv_format: str) -> Case | None:
    latent, c, *rest = case.inputs
    if kv_format == "fp8_ds":
        if not case.attrs["kv_fp8"]:
            return None
        latent = packed_latents(latent, c.shape[-1])
    return dataclasses.replace(case, inputs=(latent, c, *rest), attrs=case.attrs | {"kv_format": kv_format})


def _attention(case: Case, kv_format: str) -> Case | None:
    q, q_pe, cache, table, indices = case.inputs
    if kv_format == "fp8_ds":
        packed = packed_latents(cache.nan_to_num(0.0), q.shape[-1])
        unused = cache.isnan().any(-1)
        packed.view(-1, packed.shape[-1])[unused] = -1  # NaN in every field
        cache = packed
    return dataclasses.replace(
        case, inputs=(q, q_pe, cache, table, indices), attrs=case.attrs | {"kv_format": kv_format}
    )


def _dense_attention(case: Case, kv_format: str) -> Case | None:
    return case if kv_format == "bf16" else None


def _indexer(case: Case, kv_format: str) -> Case | None:
    q, w, cache, table, positions = case.inputs
    if kv_format == "fp8_ds":
        bad = ~cache.isfinite().all(-1)
        cache = packed_index(cache.nan_to_num(0.0, 0.0, 0.0))
        values, scales = cache.split([64 * 128, 64 * 4], dim=1)
        values = values.reshape(-1, 128).masked_fill(bad.unsqueeze(-1), -1)  # NaN in every value
        cache = torch.cat([values.view(-1, 64 * 128), scales], dim=1)
    return dataclasses.replace(
        case, inputs=(q, w, cache, table, positions), attrs=case.attrs | {"index_format": kv_format}
    )


#: op -> a function that gives a case another cache format, or None where that does not exist.
ATTRS: Final[dict[str, Callable[[Case, str], Case | None]]] = {
    "DsaCacheWrite": _cache_write,
    "MlaCacheWrite": _latent_write,
    "DsaAttention": _attention,
    "MlaAttention": _dense_attention,
    "DsaIndexer": _indexer,
}


def fake_kernels(op: str, statics: Mapping[str, Scalar], sm: int) -> KernelSet:
    """Return a descriptor as if the variants had been compiled: for tests of packing and launching."""
    sizes = {"i32": 4, "fp32": 4, "i64": 8}
    images = {}
    for variant in op_kernels(op).variants(statics, sm):
        params, at = [], 0
        for name, kind in [*variant.types.items(), ("", "*u8"), ("", "*u8")]:
            size = sizes.get(kind, 8)
            at = -(-at // size) * size
            params.append(Param(name, kind, at, size))
            at += size
        images[variant.name] = Image(
            variant=variant.name,
            entry=variant.kernel,
            cubin="none.cubin",
            sha256="",
            num_warps=variant.num_warps,
            num_ctas=1,
            programmatic=False,
            scratch_bytes=0,
            scratch_align=1,
            params=tuple(params),
            main_loop=variant.main_loop,
            driver=12000,
            resources=Resources(32, 0, 0, 0, 1.0),
        )
    return KernelSet(op, SPECS[op].version, sm, "0" * 64, dict(statics), "none", images)


def input_shapes(spec: OpSpec, bound: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Return the shapes of an operator's inputs by sizes and attributes under the symbols of its spec."""
    bound_before = {name for arg in spec.inputs for name in _symbols(arg)}
    own = [_symbols(arg) - bound_before for arg in spec.optional]
    last = max((i for i, dims in enumerate(own) if dims and all(bound.get(dim) for dim in dims)), default=-1)
    first = spec.optional[: last + 1]  # optional inputs that have sizes of their own, and those before them
    sizes = [[evaluate_dim(dim, bound) for dim in arg.shape] for arg in (*spec.inputs, *first)]
    return [tuple(n for one in shape for n in (one if isinstance(one, tuple) else (one,))) for shape in sizes]


def _symbols(arg: Arg) -> set[str]:
    """Return the symbols of a tensor's sizes."""
    return {name for dim in arg.shape for name in re.findall(r"[A-Za-z]\w*", str(dim))} - {"cdiv"}


def pack_arguments(image: Image, arguments: Mapping[str, Buffer | int | float], addresses: Mapping[str, int]) -> bytes:
    """Return the parameters of a launch as a kernel finds them, packed from a launch plan one by one."""
    last = image.params[-1]
    buffer = bytearray(last.offset + last.size)
    for param in image.params[:-2]:
        value = arguments[param.name]
        if isinstance(value, Buffer):
            value = addresses[value.name] + value.offset
        struct.pack_into("<" + argument_code(param), buffer, param.offset, value)
    return bytes(buffer)


def copy_parameters(image: Image, parameters: int) -> bytes:
    """Return the same as a driver copies it, which is given an array of pointers to values."""
    pointers = (ctypes.c_uint64 * len(image.params)).from_address(parameters)
    last = image.params[-1]
    buffer = bytearray(last.offset + last.size)
    for param, pointer in zip(image.params, pointers, strict=True):
        buffer[param.offset : param.offset + param.size] = ctypes.string_at(pointer, param.size)
    return bytes(buffer)
