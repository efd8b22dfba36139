"""DeepSeek-V3 (V3, R1, V3.1): DeepSeek-V3.2 without its indexer; every token attends to all before it."""

from typing import Final

from seekforge.exporter.models.deepseek_v3 import parameters
from seekforge.exporter.models.deepseek_v3.taps import TAPS
from seekforge.exporter.models.family import Family
from seekforge.exporter.models.shared import parameters as shared

FAMILY: Final = Family(
    model_type="deepseek_v3",
    package=__name__,
    layer_tensors=parameters.layer_tensors,
    end_tensors=shared.end_tensors,
    layer_parameters=parameters.layer_parameters,
    end_parameters=shared.end_parameters,
    mtp_parameters=shared.mtp_parameters,
    codes=shared.CODES,
    places=shared.PLACES,
    caches=parameters.caches,
    kv_formats=("bf16",),  # dense attention reads no other on a GPU
    taps=TAPS,
)
