"""Options of a build for a GPU, as tests give them."""

from __future__ import annotations

from typing import Any

from seekforge.exporter.builder.options import BuildOptions, TensorRtOptions


def gpu_options(*, settings: tuple[str, ...] = (), taps: bool = False, **options: Any) -> BuildOptions:
    """Return options of which those that only GPUs know are keywords too."""
    return BuildOptions(settings=settings, taps=taps, tensorrt=TensorRtOptions(**options))
