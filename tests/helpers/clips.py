"""Small video files, made by PyAV."""

from __future__ import annotations

import io

import av
import numpy as np


def encode(
    frames: int = 25, rate: int = 10, size: tuple[int, int] = (48, 64), kind: str = "mp4"
) -> bytes:
    """A video whose frames grow lighter from left to right and with time.

    Args:
      frames: how many.
      rate: frames per second.
      size: height and width.
      kind: of the container, `mp4` or `webm`.
    """
    buffer = io.BytesIO()
    height, width = size
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream({"mp4": "mpeg4", "webm": "libvpx"}[kind], rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            shades = np.linspace(0, 100, width)[None, :, None] + 150 * number / frames
            picture = np.broadcast_to(shades, (height, width, 3)).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
