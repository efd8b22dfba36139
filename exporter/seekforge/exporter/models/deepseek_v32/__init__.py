"""DeepSeek-V3.2 in plain PyTorch, written for reading: the model that is traced, and the reference for parity."""

from typing import Final

from seekforge.exporter.models.deepseek_v32.taps import TAPS
from seekforge.exporter.models.family import Family
from seekforge.exporter.models.shared import parameters as shared
from seekforge.exporter.models.shared.sparse import parameters

FAMILY: Final = Family(
    model_type="deepseek_v32",
    package=__name__,
    layer_tensors=parameters.layer_tensors,
    end_tensors=shared.end_tensors,
    layer_parameters=parameters.layer_parameters,
    end_parameters=shared.end_parameters,
    mtp_parameters=shared.mtp_parameters,
    codes=parameters.CODES,
    places=shared.PLACES,
    caches=parameters.caches,
    kv_formats=("fp8_ds", "bf16"),
    taps=TAPS,
)
