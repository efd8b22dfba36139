"""Stages of long work, under the name that the exporter knows them by; see `seekforge.common.cli.console`."""

from seekforge.common.cli.console import Stages

__all__ = ["Stages"]
