from __future__ import annotations

import ml_dtypes
import numpy as np

from seekforge.runtime.backends.ranks.message import Message


def test_values_and_arrays_of_every_kind_arrive_as_they_were_sent() -> None:
    arrays = {
        "ids": np.arange(6, dtype=np.int64).reshape(2, 3),
        "none": np.zeros((0, 4), np.float32),
        "scalar": np.array(7, np.int32),
        "weight": np.arange(5).astype(ml_dtypes.bfloat16),
        "bytes": np.arange(3).astype(ml_dtypes.float8_e4m3fn),
        "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    }
    data = bytearray().join(Message({"call": "run", "outputs": ["é"]}, arrays).pack())
    message = Message.unpack(data)
    assert message.values == {"call": "run", "outputs": ["é"]}
    assert list(message.arrays) == list(arrays)
    for name, array in arrays.items():
        assert message.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(message.arrays[name], array)
