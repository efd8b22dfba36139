"""The operators as TensorRT plugins: one generic class driven by the specs, for `tensorrt` and `tensorrt_rtx`."""
