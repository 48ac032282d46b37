"""Look through a whole checkpoint for values that are not numbers. Holds one block of rows at a time."""

from __future__ import annotations

import os

from abliterate.checkpoint.opened import Checkpoint
from abliterate.checkpoint.storage import whole


def require_finite(checkpoint: Checkpoint) -> None:
    """Read every floating tensor once.

    Raises:
        VerifyError: a tensor holds NaN or infinity; names the first.
    """
    for shard in checkpoint.shards:
        fd = os.open(checkpoint.path / shard, os.O_RDONLY)
        try:
            for tensor in checkpoint.tensors.values():
                matrix = whole(tensor) if tensor.file == shard else None
                if matrix is not None:
                    matrix.require_finite(fd)
        finally:
            os.close(fd)
