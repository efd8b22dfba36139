"""From a DeepSeek-V3.2 checkpoint to a canonical ONNX program, and from a program to an engine."""

import seekforge.plugins as _plugins  # noqa: F401  # first of all: it keeps libraries quiet
