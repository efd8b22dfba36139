"""How far two correct runs of the same numerics may lie apart: numbers that `build` and `parity` judge by alike."""

from __future__ import annotations

from typing import Final

#: Largest difference of FP32 logits in parts of their spread; also added to measured noise. Measured: 4e-6 between
#: ONNX Runtime and torch over all modes and contexts of the tests.
GATE: Final = 1e-4
#: Relative change that measures noise: ten times what f32 sums in another order do; in bf16 activations one rounding.
PERTURBATION: Final = 1e-6
PERTURBATION_BF16: Final = 2**-9
