"""Contrastive prompt sets: load, split, hash. Never knows models."""

from abliterate.prompts.load import builtin, load_prompts
from abliterate.prompts.promptset import PromptSet, Splits, check_contrast, split

__all__ = ["PromptSet", "Splits", "builtin", "check_contrast", "load_prompts", "split"]
