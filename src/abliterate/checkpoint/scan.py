"""Look through a whole checkpoint for values that are not numbers. Holds one block of rows at a time."""

from __future__ import annotations

import os

from abliterate.checkpoint.dtypes import EDITABLE
from abliterate.checkpoint.folder import Checkpoint
from abliterate.checkpoint.stream import read_rows, row_blocks


def require_finite(checkpoint: Checkpoint) -> None:
    """Read every floating tensor once.

    Raises:
        VerifyError: a tensor holds NaN or infinity; names the first.
    """
    for shard in checkpoint.shards:
        fd = os.open(checkpoint.path / shard, os.O_RDONLY)
        try:
            for tensor in checkpoint.tensors.values():
                if tensor.file == shard and tensor.dtype in EDITABLE:
                    for start, stop in row_blocks(tensor):
                        read_rows(fd, tensor, start, stop)
        finally:
            os.close(fd)
