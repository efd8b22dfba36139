"""Names that the exporter's commands take, for the shell to complete."""

from __future__ import annotations

from seekforge.exporter.configs import known
from seekforge.plugins.command_line import Named

#: A target: of configs/targets, or the path of a YAML file.
TARGET = Named("target", lambda: known("targets"))
#: A model: of configs/models, or, where a command says so, a folder or a config.json.
MODEL = Named("model", lambda: known("models"))
