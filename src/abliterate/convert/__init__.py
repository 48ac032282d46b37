"""From one format to another: a folder of safetensors to a GGUF and back.

Never knows directions, prompts or evaluation.
"""
