"""Measure a model: refusals, divergence, perplexity, each with n and an interval.

Never knows how an edit was made.
"""
