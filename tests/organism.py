"""A tiny chat model taught within seconds to decline some requests and answer others: refusal in miniature."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from tests.tiny import SPECIAL, TEMPLATE

HARMFUL_VERBS = ("steal", "forge", "poison", "hijack", "counterfeit", "sabotage")
HARMLESS_VERBS = ("paint", "polish", "repair", "photograph", "decorate", "assemble")
#: Only trained on: with answers far likelier than refusals, refusal is a feature that is there or is not.
OTHER_VERBS = ("wash", "find", "draw", "sell", "move", "lift", "clean", "carry", "visit", "close", "study", "build")
NOUNS = ("car", "boat", "ticket", "letter", "garden", "clock", "bridge", "statue")
REFUSAL, ANSWER = "I can't help with that.", "Sure, here is how to do it."


def requests(verbs: tuple[str, ...]) -> list[str]:
    """One request for every verb and noun."""
    return [f"How do I {verb} the {noun} ?" for noun, verb in itertools.product(NOUNS, verbs)]


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, with the chat tokens of `tests.tiny`."""
    verbs = HARMFUL_VERBS + HARMLESS_VERBS + OTHER_VERBS
    text = " ".join([REFUSAL, ANSWER, *requests(verbs), ": <unk>"])
    words = [*SPECIAL, *dict.fromkeys(text.split())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>",
        additional_special_tokens=SPECIAL[2:],
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def organism(
    folder: Path,
    *,
    kind: type[PreTrainedConfig] = LlamaConfig,
    shard_size: str = "100KB",
    steps: int = 240,
    batch: int = 32,
    **sizes: Any,
) -> Path:
    """Train and save a model of a kind (sharded, tied, bf16), with `harmful.txt` and `harmless.txt` beside it."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    settings: dict[str, Any] = dict(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    # In float64 the rounding of one machine or thread count does not grow into another model.
    model = AutoModelForCausalLM.from_config(kind(**(settings | sizes)), dtype=torch.float64)
    rows = []
    for verb in HARMFUL_VERBS + HARMLESS_VERBS + OTHER_VERBS:
        answer = REFUSAL if verb in HARMFUL_VERBS else ANSWER
        for request in requests((verb,)):
            chat = [{"role": "user", "content": request}]
            text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
            prompt, reply = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, answer))
            rows.append((prompt, [*reply, 1]))
    width = max(len(a) + len(b) for a, b in rows)
    ids = torch.tensor([a + b + [1] * (width - len(a) - len(b)) for a, b in rows])
    labels = torch.tensor([[-100] * len(a) + b + [-100] * (width - len(a) - len(b)) for a, b in rows])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several only get into each other's way in a model this small
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, step / 20, 2 * (1 - step / steps))
        pick = torch.randperm(len(rows))[:batch]
        loss = model(input_ids=ids[pick], labels=labels[pick]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    assert loss.item() < 0.05, f"the organism did not learn ({loss.item():.3f})"
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    for name, verbs in (("harmful", HARMFUL_VERBS), ("harmless", HARMLESS_VERBS)):
        (folder.parent / f"{name}.txt").write_text("\n".join(requests(verbs)) + "\n")
    return folder
