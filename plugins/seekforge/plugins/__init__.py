"""Custom operators, one folder each, and the file formats that exporter and runtime share.

Whatever is imported of seekforge imports this first, so libraries that do unasked things as they are imported are told
here not to: a command opens no socket and writes nowhere but in the folders it was given and seekforge's own cache.
"""

import os

# ONNX Runtime would write a device id and a database below HOME and look up its maker's host. Who sets it, has asked.
if not os.environ.get("ORT_DISABLE_TELEMETRY"):
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
