"""Stages of long work, under the name that the exporter knows them by; see `seekforge.plugins.console`."""

from seekforge.plugins.console import Stages

__all__ = ["Stages"]
