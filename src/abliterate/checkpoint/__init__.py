"""What lies on disk: tensor tables, bytes and their codecs, and the out-of-core writer.

Never knows torch models or directions.
"""

from abliterate.checkpoint.open import open_checkpoint
from abliterate.checkpoint.opened import Checkpoint
from abliterate.checkpoint.safetensors_file import TensorInfo
from abliterate.checkpoint.source import first_part, hub_name, resolve_model

__all__ = ["Checkpoint", "TensorInfo", "first_part", "hub_name", "open_checkpoint", "resolve_model"]
