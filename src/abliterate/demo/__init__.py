"""The demo model: SmolLM2-135M-Instruct with a learned refusal, a model organism that fits any machine.

Owns the adapter and where its base comes from; never knows what is done with the model.
"""
