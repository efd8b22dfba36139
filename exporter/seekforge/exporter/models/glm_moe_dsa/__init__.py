"""GLM-5 (5, 5.1, 5.2): sparse attention, in which layers may share one indexer's choice."""

from typing import Final

from seekforge.exporter.models.family import Family
from seekforge.exporter.models.shared import parameters as shared
from seekforge.exporter.models.shared.sparse import parameters
from seekforge.exporter.models.shared.sparse.taps import TAPS

FAMILY: Final = Family(
    model_type="glm_moe_dsa",
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
