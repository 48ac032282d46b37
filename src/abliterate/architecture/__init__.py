"""Where a model class writes to its residual stream, learned by experiment on a shrunken twin.

Owns the twin, the experiments, and the table of what they found. Never reads a real checkpoint's weights,
and never knows directions. Only `table` may be imported without torch.
"""
