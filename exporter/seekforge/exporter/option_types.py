"""Names that the exporter's commands take, for the shell to complete."""

from __future__ import annotations

from seekforge.common.cli.options import Named
from seekforge.common.configs import known

#: A target: of configs/targets, or the path of a YAML file.
TARGET = Named("target", lambda: known("targets"))
#: A model: of configs/models, or, where a command says so, a folder or a config.json.
MODEL = Named("model", lambda: known("models"))
