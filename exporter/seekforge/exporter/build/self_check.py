"""What an engine must reproduce before it serves: results of the PyTorch model on one prompt, and a tolerance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from seekforge.exporter.build.ort_session import OrtSession
from seekforge.exporter.model.session import StepInputs, TorchSession, make_step
from seekforge.exporter.model.step import Settings
from seekforge.plugins.errors import EngineError
from seekforge.plugins.formats.bindings import TensorSource
from seekforge.plugins.formats.manifest import Limits, SelfCheck, SelfCheckRow
from seekforge.plugins.formats.model_config import ModelConfig
from seekforge.plugins.formats.numerics import numerics_from_dict
from seekforge.plugins.formats.program import BLOCK_SIZE, GraphIO
from seekforge.plugins.spec import cdiv

_TOP = 20


def make_self_check(
    folder: Path,
    face: GraphIO,
    config: ModelConfig,
    numerics: dict[str, Any],
    source: TensorSource,
    limits: Limits,
) -> SelfCheck:
    """Run the PyTorch model and the new engine on one prompt, compare them, and return what to store."""
    raise NotImplementedError
