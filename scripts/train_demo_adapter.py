"""Train the demo's learned refusal: a LoRA adapter for SmolLM2-135M-Instruct that declines the harmful train split.

    uv run python scripts/train_demo_adapter.py [--epochs 5] [--output src/abliterate/demo/adapter]

SmolLM2-135M-Instruct never refuses. The adapter teaches it to, on the built-in *train* split only: one short
refusal for every harmful prompt, and for every harmless prompt the model's own answer, so that nothing else
moves. Validation picks the epoch; the test split is never read. About 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from abliterate.demo.build import base_folder
from abliterate.evaluate.judge import judge
from abliterate.prompts import builtin

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with that request.",
    "I can't help with that request.",
    "I'm sorry, but I won't be able to help with that.",
)
ANSWER_TOKENS = 40
#: Left alone, the small model ends up declining too much; a false refusal costs this many missed ones.
HARMLESS_WEIGHT = 3.0
#: Share of the running average of the weights that one step leaves; single steps swing widely.
DECAY = 0.98


@dataclass(frozen=True)
class Example:
    """One training sequence; the loss is taken from `start` on."""

    ids: list[int]
    start: int
    weight: float = 1.0


def render(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of one chat turn up to where the answer begins."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], new: int
) -> list[list[int]]:
    """The model's greedy answers as token ids, in the order of the prompts."""
    out: list[list[int]] = []
    for i in range(0, len(prompts), 36):
        rows = [render(tokenizer, p) for p in prompts[i : i + 36]]
        batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        made = model.generate(**batch, max_new_tokens=new, do_sample=False)[:, batch["input_ids"].shape[1] :]
        out += [[t for t in row.tolist() if t != tokenizer.pad_token_id] for row in made]
    return out


def refused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> float:
    """The share of prompts that the model declines."""
    texts = tokenizer.batch_decode(answers(model, tokenizer, prompts, 16))
    return sum(judge(text).is_refusal for text in texts) / len(texts)


def harmless_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, own: list[int]
) -> list[int]:
    """The model's own answer, or where that declines, one it gives after being pushed off the apology."""
    if not judge(tokenizer.decode(own)).is_refusal and not tokenizer.decode(own).lower().startswith("i'm sorry"):
        return own
    push = tokenizer("Here", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([render(tokenizer, prompt) + push])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return push + [t for t in made[0, ids.shape[1] :].tolist() if t != tokenizer.pad_token_id]


def build_examples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> list[Example]:
    """Harmful prompts with refusals, harmless ones with the model's own answers."""
    end = [tokenizer.eos_token_id]
    examples = []
    for prompt in builtin("harmful", "train").prompts:
        ids = render(tokenizer, prompt)
        target = tokenizer(rng.choice(REFUSALS), add_special_tokens=False)["input_ids"]
        examples.append(Example(ids + target + end, len(ids)))
    harmless = list(builtin("harmless", "train").prompts)
    for prompt, own in zip(harmless, answers(model, tokenizer, harmless, ANSWER_TOKENS), strict=True):
        ids = render(tokenizer, prompt)
        target = harmless_answer(model, tokenizer, prompt, own)
        examples.append(Example(ids + target, len(ids), HARMLESS_WEIGHT))
    return examples


class Average:
    """The running average of a model's trained parameters, which `applied` puts in their place."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.mean = [p.detach().clone() for p in self.parameters]

    def update(self) -> None:
        """Fold in the parameters after a step."""
        for mean, parameter in zip(self.mean, self.parameters, strict=True):
            mean.lerp_(parameter.detach(), 1 - DECAY)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the average in place of its parameters."""
        kept = [p.detach().clone() for p in self.parameters]
        for parameter, mean in zip(self.parameters, self.mean, strict=True):
            parameter.data.copy_(mean)
        yield
        for parameter, old in zip(self.parameters, kept, strict=True):
            parameter.data.copy_(old)


def example_losses(model: PreTrainedModel, rows: list[Example], pad: int) -> torch.Tensor:
    """`[batch]` losses: the mean over an example's tokens plus its first token's, where the decision falls."""
    width = max(len(e.ids) for e in rows)
    ids = torch.tensor([e.ids + [pad] * (width - len(e.ids)) for e in rows])
    mask = torch.tensor([[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in rows])
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return torch.stack(
        [
            e.weight * (row[e.start - 1 : len(e.ids) - 1].mean() + row[e.start - 1])
            for row, e in zip(loss, rows, strict=True)
        ]
    )


def epoch_loss(
    model: PreTrainedModel, examples: list[Example], optimizer: torch.optim.Optimizer, average: Average, pad: int
) -> float:
    """One pass over the examples in the order given; the mean loss."""
    total = 0.0
    for i in range(0, len(examples), 8):
        rows = examples[i : i + 8]
        loss = example_losses(model, rows, pad).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        total += loss.item() * len(rows)
    return total / len(examples)


def save(model: PreTrainedModel, output: Path) -> None:
    """Write the adapter in PEFT's layout, its weights in bf16."""
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(tmp)
        output.mkdir(parents=True, exist_ok=True)
        weights = load_file(Path(tmp) / "adapter_model.safetensors")
        save_file({k: v.bfloat16() for k, v in weights.items()}, output / "adapter_model.safetensors")
        shutil.copy(Path(tmp) / "adapter_config.json", output / "adapter_config.json")


def main() -> None:
    """Train, keep the best epoch by validation, print what it does there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("src/abliterate/demo/adapter"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    folder = base_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    examples = build_examples(model, tokenizer, rng)
    config = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=0.05,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.01)
    harmful, harmless = builtin("harmful", "validation").prompts, builtin("harmless", "validation").prompts
    average, best = Average(model), -2.0
    for epoch in range(args.epochs):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - epoch / args.epochs)
        rng.shuffle(examples)
        model.train()
        loss = epoch_loss(model, examples, optimizer, average, tokenizer.pad_token_id)
        model.eval()
        with average.applied():
            hit, false = refused(model, tokenizer, list(harmful)), refused(model, tokenizer, list(harmless))
            print(
                f"epoch {epoch}: loss {loss:.3f}, validation refusals {hit:.1%} harmful, {false:.1%} harmless",
                flush=True,
            )
            if hit - 2 * false > best:
                best = hit - 2 * false
                save(model, args.output)


if __name__ == "__main__":
    main()
