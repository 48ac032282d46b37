"""A checkpoint in motion: load it, render chats, batch, hook its residual stream, generate.

Never knows what a refusal is. Import its modules by name: `sites` and `progress` need no torch, the rest do.
"""
