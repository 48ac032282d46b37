"""Contrastive prompt sets: load, split, hash. Never knows models."""

from abliterate.prompts.load import builtin, load_prompts
from abliterate.prompts.promptset import PromptSet, Splits, check_contrast, joined, split

__all__ = ["PromptSet", "Splits", "builtin", "check_contrast", "joined", "load_prompts", "split"]
