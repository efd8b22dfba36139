"""What several of the exporter's commands take: names, for the shell to complete, and an option."""

from __future__ import annotations

from typing import Final

import click

from seekforge.common.cli.options import Named
from seekforge.common.configs import known

#: A target: of configs/targets, or the path of a YAML file.
TARGET = Named("target", lambda: known("targets"))
#: A model: of configs/models, or, where a command says so, a folder or a config.json.
MODEL = Named("model", lambda: known("models"))
#: For commands about kernels: how the weights are that they read.
kernel_precision_option: Final = click.option(
    "--precision",
    type=click.Choice(["fp8", "nvfp4"]),
    default="fp8",
    show_default=True,
    help="nvfp4: experts in NVFP4, on SMs from 100 on.",
)
