"""Device functions that kernels share: FP8 and bf16 rounding, decoding, and the activation quantizer.

Kernels compute in f32 and convert at the border, since Triton's CPU interpreter does bf16 arithmetic on raw bits and
narrows f32 wrongly: `to_bf16` and `to_e4m3` round with integer operations there, and the casts after them are
exact. On a GPU the casts round by themselves. On SM80, which has no float8 type, bytes are coded and decoded by hand
(`FP8` is False).
"""

import os

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
#: Whether kernels are compiled for an SM on which a launch may start before the one before it has ended. The compiler
#: sets it (`providers/images.py`), in a process that serves one SM.
PROGRAMMATIC = tl.constexpr(False)


@triton.jit
def wait_for_inputs():
    """Wait until the launches before this one have ended and written, and let the next one start to do the same.

    Every kernel begins with it, so that each launch has waited for all before it, whichever of them it reads. Where a
    launch does not start early, it does nothing (programmatic dependent launch).
    """
    if PROGRAMMATIC:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def round_to_e4m3(x):
    """Round |x| <= 448 to the nearest e4m3 value, ties to even, still as f32."""
    bits = x.to(tl.int32, bitcast=True)
    sign = bits & -2147483648
    mag = bits & 0x7FFFFFFF
    normal = (mag + 0x7FFFF + ((mag >> 20) & 1)) & -1048576  # keep 3 mantissa bits
    small = ((mag.to(tl.float32, bitcast=True) + 16384.0) - 16384.0).to(tl.int32, bitcast=True)  # quantum 2^-9
    return (tl.where(mag < 0x3C800000, small, normal) | sign).to(tl.float32, bitcast=True)


@triton.jit
def to_e4m3(x, FP8: tl.constexpr):
    """Return the e4m3 byte (u8) of f32 `x` after clamping to ±448; NaN gives 0x7F, so that it stays visible."""
    clamped = tl.minimum(tl.maximum(x, -448.0), 448.0)
    if FP8:
        if INTERPRET:
            clamped = round_to_e4m3(clamped)
        byte = clamped.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = round_to_e4m3(clamped).to(tl.int32, bitcast=True)
        mag = bits & 0x7FFFFFFF
        normal = (mag >> 20) - (120 << 3)  # exponent and 3 mantissa bits, bias 127 -> 7
        small = (mag.to(tl.float32, bitcast=True) * 512.0).to(tl.int32)  # multiples of 2^-9
        byte = (tl.where(mag < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)
    return tl.where(x != x, 0x7F, byte).to(tl.uint8)


@triton.jit
def _byte_value(x):
    """Return a finite e4m3 byte as f32: the value times 2^-8 as f16 is two shifts away, subnormals included."""
    u = x.to(tl.uint16)
    half = ((u & 0x80) << 8) | ((u & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def from_e4m3(x, FP8: tl.constexpr):
    """Return e4m3 values as f32: `x` is float8, or u8 bytes where there is no such type. 0x7F and 0xFF are NaN."""
    if FP8:
        value = x.to(tl.float32)
        if INTERPRET:  # it reads the NaN byte as 480
            value = tl.where(tl.abs(value) > 448.0, float("nan"), value)
    else:
        value = tl.where((x & 0x7F) == 0x7F, float("nan"), _byte_value(x))
    return value


@triton.jit
def to_bf16(x):
    """Round f32 to bf16, ties to even."""
    if INTERPRET:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x != x, x, rounded.to(tl.float32, bitcast=True))
    return x.to(tl.bfloat16)


@triton.jit
def round_bf16(x):
    """Round f32 to a bf16 value, still as f32."""
    return to_bf16(x).to(tl.float32)


@triton.jit
def dot_f32(a, b, acc=None):
    """Matrix product of bf16 or f16 operands with f32 sums."""
    if INTERPRET:  # products of both are exact in f32
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def k_blocks(first, blocks, PARTS: tl.constexpr):
    """Return (blocks along K from `first`, a part each; whether they are inside): blocks outside are the first one."""
    block = first + tl.arange(0, PARTS)
    inside = block < blocks
    return tl.where(inside, block, 0), inside


@triton.jit
def widen(x, FP8: tl.constexpr):
    """Return FP8 (or bytes, or bf16) as bf16; exact."""
    if x.dtype == tl.bfloat16:
        return x
    if x.dtype == tl.uint8:
        return _byte_value(x).to(tl.bfloat16)  # no NaN: weights and our own bytes have none
    return x.to(tl.float32).to(tl.bfloat16)


@triton.jit
def ue8m0(amax):
    """Return (scale, 1 / scale), powers of two, of blocks whose largest magnitude is `amax` (spec §5.1)."""
    p = tl.maximum(amax, 1e-4) * 0.002232142857142857  # f32(1/448) = 0x3B124925
    bits = p.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    exponent = tl.minimum(exponent, 253)  # an infinite amax: keep 1 / scale a normal number
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def quantize_kernel(x_ptr, q_ptr, scale_ptr, num_rows, K, ROWS: tl.constexpr, FP8: tl.constexpr):
    """x bf16 [T, K] -> q e4m3 bytes [T, K], scale f32 [T, K/128].

    One program: ROWS rows x one block of 128. Bound by memory: 3 bytes per element.
    """
    wait_for_inputs()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    valid = row < num_rows
    at = row[:, None].to(tl.int64) * K + block * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + at, mask=valid[:, None], other=0.0).to(tl.float32)
    scale, inverse = ue8m0(tl.max(tl.abs(x), 1))
    tl.store(q_ptr + at, to_e4m3(x * inverse[:, None], FP8), mask=valid[:, None])
    tl.store(scale_ptr + row.to(tl.int64) * (K // 128) + block, scale, mask=valid)
