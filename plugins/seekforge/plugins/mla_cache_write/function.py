"""`MlaCacheWrite` in standard ONNX operators: a scatter straight into the cache input, which is updated in place."""

import onnx

from seekforge.common.errors import ProgramError
from seekforge.plugins.functions.builder import Attrs, Text, cast, fake_quantize
from seekforge.plugins.functions.specialization import Specialization
from seekforge.plugins.mla_cache_write.spec import SPEC


def body(attrs: Attrs, how: Specialization) -> onnx.FunctionProto:
    """Return the scatter. ONNX reads slot −1 as the last one, so padded rows are sent to slot 0, which is scrap.

    Raises:
        ProgramError: the cache has the byte layout fp8_ds, which only the plugin writes.
    """
    if attrs["kv_format"] == "fp8_ds":
        raise ProgramError(
            "MlaCacheWrite: kv_format fp8_ds has no decomposition; build with plugins, or with kv_format f32 or bf16"
        )
    text = Text()
    act = how.activations
    c = fake_quantize(text, "c", "c_", dtype=act, bodies=how.bodies) if attrs["kv_fp8"] else "c"
    text.add(f"""
  column = Reshape(slot_mapping, {text.ints(-1, 1)})
  slots = Max(column, {text.i64(0)})
  latent = Concat<axis = -1>({c}, k_pe)
  latent_rows = Flatten<axis = 2>(latent)
""")
    latent = cast(text, "latent_rows", "latent_cast", to=str(attrs["kv_format"]), from_=act)
    text.add(f"latent_cache_out = ScatterND(latent_cache, slots, {latent})")
    return text.body_of(SPEC)
