"""Public benchmarks of base and edited model through lm-eval, and what of each score was retained.

Never knows how the second model came about.
"""
