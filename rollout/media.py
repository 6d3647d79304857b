"""Video clips, built by one function for the trainer's processor and for vLLM's, so that both get the same input."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL.Image import Image

# Qwen2.5-VL samples video at two frames per second (qwen_vl_utils), so data sets contain frames at that rate. The
# position ids of its tokens contain times, which depend on this rate.
FRAMES_PER_SECOND = 2.0


def clip(frames: Sequence[Image]) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the frames, [frames, height, width, 3], and the fields of transformers' ``VideoMetadata``.

    Raises ValueError when the frames differ in size.
    """
    for i, frame in enumerate(frames):
        if frame.size != frames[0].size:
            raise ValueError(f"frame {i} of a clip has {frame.size} pixels, the first has {frames[0].size}")
    metadata = {
        "total_num_frames": len(frames),
        "fps": FRAMES_PER_SECOND,
        "duration": len(frames) / FRAMES_PER_SECOND,
        "frames_indices": list(range(len(frames))),
    }
    return np.stack([np.asarray(frame) for frame in frames]), metadata
