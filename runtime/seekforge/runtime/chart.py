"""Line charts as PNG with numpy and zlib alone: a benchmark's picture needs no plotting library."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 400, 80, 60, 50, 150
_COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207))
#: 3×5 glyphs: a character, then an octal digit per row.
_FONT = """
075557 126227 271747 371717 455711 574717 674757 771111 875757 975717 .00002 /11244 :02020 -00700 %51245 ,00024
A75755 B65656 C74447 D65556 E74747 F74744 G74557 H55755 I72227 J11157 K55655 L44447 M57755 N65555 O75557 P75744
Q75571 R75765 S74717 T72222 U55557 V55552 W55775 X55255 Y55222 Z71247
"""
_GLYPHS = {entry[0]: entry[1:] for entry in _FONT.split()}


def line_charts(path: Path, charts: Sequence[tuple[str, str, Mapping[str, Sequence[tuple[float, float]]]]]) -> None:
    """Write charts below one another.

    Args:
        path: PNG file to write.
        charts: (title, name of the x axis, series name -> points), each; points have x > 0 and y ≥ 0. The x axis is
            logarithmic.
    """
    image = np.concatenate([_draw(title, x_name, series) for title, x_name, series in charts])
    path.write_bytes(_png(image))


def _draw(title: str, x_name: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> np.ndarray:
    image = np.full((_HEIGHT, _WIDTH, 3), 255, np.uint8)
    points = [point for values in series.values() for point in values]
    xs = sorted({x for x, _ in points})
    top = max((y for _, y in points), default=1.0) * 1.05 or 1.0
    low, high = np.log(xs[0]), np.log(xs[-1])

    def place(x: float, y: float) -> tuple[int, int]:
        across = (np.log(x) - low) / (high - low) if high > low else 0.5
        return (
            round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT)),
            round(_HEIGHT - _BOTTOM - y / top * (_HEIGHT - _BOTTOM - _TOP)),
        )

    _text(image, _LEFT, 18, title, 3)
    _text(image, _LEFT, _HEIGHT - 22, x_name, 2)
    for part in range(5):
        _, y = place(xs[0], top * part / 4)
        image[y, _LEFT : _WIDTH - _RIGHT] = 220
        _text(image, 6, y - 5, f"{top * part / 4:.4g}", 2)
    for x in xs:
        at, _ = place(x, 0)
        image[_HEIGHT - _BOTTOM : _HEIGHT - _BOTTOM + 6, at] = 0
        _text(image, at - 6, _HEIGHT - _BOTTOM + 10, f"{x:.4g}", 2)
    for number, (name, values) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [place(x, y) for x, y in sorted(values)]
        for (x0, y0), (x1, y1) in itertools.pairwise(places):
            steps = max(abs(x1 - x0), abs(y1 - y0), 1)
            for x, y in zip(np.linspace(x0, x1, steps + 1).astype(int), np.linspace(y0, y1, steps + 1).astype(int)):
                image[y : y + 2, x : x + 2] = colour
        for x, y in places:
            image[y - 3 : y + 4, x - 3 : x + 4] = colour
        _text(image, _WIDTH - _RIGHT + 12, _TOP + 18 * number, name, 2, colour)
    return image


def _text(
    image: np.ndarray, x: int, y: int, text: str, scale: int, colour: tuple[int, int, int] = (40, 40, 40)
) -> None:
    for char in text.upper():
        for row, bits in enumerate(_GLYPHS.get(char, "00000")):
            for column in range(3):
                if int(bits, 8) >> (2 - column) & 1:
                    top, left = y + row * scale, x + column * scale
                    image[top : top + scale, left : left + scale] = colour
        x += 4 * scale


def _png(image: np.ndarray) -> bytes:
    """Encode [H, W, 3] uint8."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = image.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
