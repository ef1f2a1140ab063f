"""Attention of batches that each have another length, without the kernels that plan for each."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from torch.backends import cuda

_lock = Lock()
_inside = 0
_before = True


@contextmanager
def attend_at_any_length() -> Iterator[None]:
    """Within it, torch's attention leaves cuDNN's kernels out; what else is switched on or off stays so.

    cuDNN makes a plan for each shape that it has not met, and answers that are written have another length at each
    token. The results are the same but for rounding. torch has the switch for all threads: the last that leaves
    restores it.
    """
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = cuda.cudnn_sdp_enabled()
            cuda.enable_cudnn_sdp(False)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                cuda.enable_cudnn_sdp(_before)
