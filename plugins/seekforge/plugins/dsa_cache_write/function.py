"""`DsaCacheWrite` in standard ONNX operators, for the 2-D caches.

The scatter goes straight into the cache input: ONNX Runtime then updates it in place when input and output are
bound to one buffer; a Reshape in between would cost a copy of the cache. ONNX reads slot −1 as the last one, so
padded rows are sent to slot 0, which is scrap.
"""

import onnx

from seekforge.common.errors import ProgramError
from seekforge.plugins.dsa_cache_write.spec import SPEC
from seekforge.plugins.functions.builder import Attrs, Text, cast, fake_quantize
from seekforge.plugins.functions.specialization import Specialization


def body(attrs: Attrs, how: Specialization) -> onnx.FunctionProto:
    """Return the two scatters.

    Raises:
        ProgramError: a cache has the byte layout fp8_ds, which only the plugin writes.
    """
    for name in ("kv_format", "index_format"):
        if attrs[name] == "fp8_ds":
            raise ProgramError(
                f"DsaCacheWrite: {name} fp8_ds has no decomposition; build with plugins, or with kv_format f32 or bf16"
            )
    text = Text()
    act = how.activations
    c = fake_quantize(text, "c", "c_", dtype=act, bodies=how.bodies) if attrs["kv_fp8"] else "c"
    k = fake_quantize(text, "index_k", "k_", dtype=act, bodies=how.bodies) if attrs["indexer_fp8"] else "index_k"
    text.add(f"""
  column = Reshape(slot_mapping, {text.ints(-1, 1)})
  slots = Max(column, {text.i64(0)})
  latent = Concat<axis = -1>({c}, k_pe)
  latent_rows = Flatten<axis = 2>(latent)
  index_rows = Flatten<axis = 2>({k})
""")
    latent = cast(text, "latent_rows", "latent_cast", to=str(attrs["kv_format"]), from_=act)
    index = cast(text, "index_rows", "index_cast", to=str(attrs["index_format"]), from_=act)
    text.add(f"latent_cache_out = ScatterND(latent_cache, slots, {latent})")
    text.add(f"index_cache_out = ScatterND(index_cache, slots, {index})")
    return text.body_of(SPEC)
