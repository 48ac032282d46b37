"""What differs between two checkpoints at rest, and along which direction.

Runs no model; never knows how the second came about.
"""
