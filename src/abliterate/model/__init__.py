"""A checkpoint in motion: load it, render chats, batch, hook its residual stream, generate.

Never knows what a refusal is.
"""

from abliterate.model.chat import ChatFormat
from abliterate.model.load import ChatModel, load_model

__all__ = ["ChatFormat", "ChatModel", "load_model"]
