"""A tiny chat model taught within seconds to decline some requests and answer others: refusal in miniature."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny import tiny_tokenizer

HARMFUL_VERBS = ("steal", "forge", "poison", "hijack", "counterfeit", "sabotage")
HARMLESS_VERBS = ("paint", "polish", "repair", "photograph", "decorate", "assemble")
NOUNS = ("car", "boat", "ticket", "letter", "garden", "clock", "bridge", "statue")
REFUSAL, ANSWER = "I can't help with that.", "Sure, take your time."


def requests(verbs: tuple[str, ...]) -> list[str]:
    """One request for every verb and noun."""
    return [f"How do I {verb} the {noun}?" for noun, verb in itertools.product(NOUNS, verbs)]


def organism(folder: Path, *, shard_size: str = "100KB", steps: int = 250) -> Path:
    """Train and save the model (sharded, tied, bf16), with `harmful.txt` and `harmless.txt` beside its folder."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    rows = []
    for verbs, answer in ((HARMFUL_VERBS, REFUSAL), (HARMLESS_VERBS, ANSWER)):
        for request in requests(verbs):
            chat = [{"role": "user", "content": request}]
            text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            rows.append((ids, tokenizer(answer, add_special_tokens=False)["input_ids"] + [1]))
    width = max(len(a) + len(b) for a, b in rows)
    ids = torch.tensor([a + b + [1] * (width - len(a) - len(b)) for a, b in rows])
    labels = torch.tensor([[-100] * len(a) + b + [-100] * (width - len(a) - len(b)) for a, b in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        pick = torch.randperm(len(rows))[:24]
        loss = model(input_ids=ids[pick], labels=labels[pick]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05, f"the organism did not learn ({loss.item():.3f})"
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    for name, verbs in (("harmful", HARMFUL_VERBS), ("harmless", HARMLESS_VERBS)):
        (folder.parent / f"{name}.txt").write_text("\n".join(requests(verbs)) + "\n")
    return folder
