"""llama.cpp's own converter, on a checkpoint whose tokenizer it has not seen.

    python -m tests.benchmarks.cpu.convert LLAMA_SOURCE CHECKPOINT OUT.gguf

The converter knows by a hash which way a tokenizer splits text, and refuses one that is not on its list. What is
measured are token ids, so the file says that it splits as DeepSeek-V3 does. Weights stay F32; the draft layer, which
no turn uses, is left out.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main() -> None:
    source, checkpoint, out = sys.argv[1:]
    sys.path[:0] = [source, str(Path(source) / "gguf-py")]
    importlib.import_module("conversion.base").TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-v3"
    model = importlib.import_module("conversion.deepseek").DeepseekV32Model
    model.set_vocab = model._set_vocab_gpt2  # its own asks tokenizer_config.json for a key and does the same
    sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outfile", out, "--outtype", "f32", "--no-mtp"]
    importlib.import_module("convert_hf_to_gguf").main()


if __name__ == "__main__":
    main()
