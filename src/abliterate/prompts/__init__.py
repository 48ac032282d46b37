"""Contrastive prompt sets: load, split, hash. Never knows models."""

from abliterate.prompts.load import builtin, load_prompts
from abliterate.prompts.promptset import PromptSet, Splits, check_contrast, check_unseen, joined, split

__all__ = ["PromptSet", "Splits", "builtin", "check_contrast", "check_unseen", "joined", "load_prompts", "split"]
