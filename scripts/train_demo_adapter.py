"""Train the demo's learned refusal: a LoRA adapter for SmolLM2-135M-Instruct that declines the harmful train split.

    uv run python scripts/train_demo_adapter.py [--epochs 6] [--output src/abliterate/demo/adapter]

SmolLM2-135M-Instruct never refuses, but it does represent whether a request is harmful. A low-rank adapter trained
freely learns the few hundred train prompts by heart and declines their harmless look-alikes too; so the reading
half of each rank-1 adapter is fixed to a ridge regression of harmfulness, and only the writing half is trained: one
short refusal for every harmful train prompt, the model's own answer for every harmless one. Validation picks the
epoch; the test split is never read. About 10 minutes on two cores.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from abliterate.demo.build import HUB_ID, base_folder
from abliterate.evaluate.judge import judge
from abliterate.prompts import builtin

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with that request.",
    "I can't help with that request.",
    "I'm sorry, but I won't be able to help with that.",
)
ANSWER_TOKENS = 40
#: Where the base tells harmful from harmless requests best, early enough for a direction to carry it onwards.
LAYERS = range(14, 22)
RIDGE = 0.03
#: Target of harmless requests: regression shrinks towards the mean, and this puts unseen harmless ones near zero.
HARMLESS = -0.35
#: Tokens of the template behind a request.
TAIL = 5


@dataclass(frozen=True)
class Example:
    """One training sequence; the loss is taken from `start` on."""

    ids: list[int]
    start: int


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
        examples.append(Example(ids + target, len(ids)))
    return examples


@torch.inference_mode()
def readouts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[int, torch.Tensor]:
    """For each of `LAYERS` the ridge regression `[1, d_mlp]` from its MLP's inner activations to "is harmful".

    The target is 1 at the template's tokens behind a harmful request, `HARMLESS` behind a harmless one, and 0 at
    the requests' own tokens: a feature that is there or is not.
    """
    inner: dict[int, torch.Tensor] = {}
    hooks = [
        model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(
            lambda _module, args, layer=layer: inner.__setitem__(layer, args[0].double())
        )
        for layer in LAYERS
    ]
    features: dict[int, list[torch.Tensor]] = {layer: [] for layer in LAYERS}
    targets = []
    for kind, target in (("harmful", 1.0), ("harmless", HARMLESS)):
        prompts = builtin(kind, "train").prompts
        for i in range(0, len(prompts), 36):
            rows = [render(tokenizer, p) for p in prompts[i : i + 36]]
            model(**tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt"))
            for layer in LAYERS:
                tail, request = inner[layer][:, -TAIL:], inner[layer][:, -3 * TAIL : -TAIL : 3]
                features[layer] += [tail.flatten(0, 1), request.flatten(0, 1)]
            targets += [torch.full((tail.shape[0] * TAIL,), target), torch.zeros(request.shape[0] * request.shape[1])]
    for hook in hooks:
        hook.remove()
    y = torch.cat(targets).double()
    found = {}
    for layer in LAYERS:
        x = torch.cat(features[layer])
        scale = x.std(0) + 1e-2
        x = x / scale
        gram = x.T @ x / len(x) + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
        found[layer] = (torch.linalg.solve(gram, x.T @ y / len(x)) / scale).float()[None]
    return found


def example_losses(model: PreTrainedModel, rows: list[Example], pad: int) -> torch.Tensor:
    """`[batch]` losses: the mean over an example's tokens plus its first token's, where the decision falls."""
    width = max(len(e.ids) for e in rows)
    ids = torch.tensor([e.ids + [pad] * (width - len(e.ids)) for e in rows])
    mask = torch.tensor([[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in rows])
    # The vocabulary is most of a small model's work: logits are taken only where an answer token is predicted.
    first = min(e.start for e in rows) - 1
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=width - first).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, first + 1 :], reduction="none")
    return torch.stack(
        [
            row[e.start - 1 - first : len(e.ids) - 1 - first].mean() + row[e.start - 1 - first]
            for row, e in zip(loss, rows, strict=True)
        ]
    )


def epoch_loss(model: PreTrainedModel, examples: list[Example], optimizer: torch.optim.Optimizer, pad: int) -> float:
    """One pass over the examples in the order given; the mean loss."""
    total = 0.0
    for i in range(0, len(examples), 8):
        rows = examples[i : i + 8]
        loss = example_losses(model, rows, pad).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item() * len(rows)
    return total / len(examples)


def save(model: PreTrainedModel, output: Path) -> None:
    """Write the adapter in PEFT's layout."""
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(tmp)
        output.mkdir(parents=True, exist_ok=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copy(Path(tmp) / name, output / name)


def adapted(base: PreTrainedModel, reads: dict[int, torch.Tensor]) -> PreTrainedModel:
    """The base with a rank-1 adapter on the MLP output of each of `LAYERS`: `A` reads, fixed; `B` is to be trained."""
    config = LoraConfig(
        r=1, lora_alpha=1, target_modules=["down_proj"], layers_to_transform=list(LAYERS), task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = HUB_ID
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            layer = int(name.split(".layers.")[1].split(".")[0])
            parameter.data.copy_(reads[layer])
        parameter.requires_grad_("lora_B" in name)
    return model


def main() -> None:
    """Train, keep the best epoch by validation, print what it does there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=5e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("src/abliterate/demo/adapter"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    folder = base_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    examples = build_examples(base, tokenizer, rng)
    model = adapted(base, readouts(base, tokenizer))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    harmful, harmless = builtin("harmful", "validation").prompts, builtin("harmless", "validation").prompts
    best = -2.0
    for epoch in range(args.epochs):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - epoch / args.epochs)
        rng.shuffle(examples)
        loss = epoch_loss(model, examples, optimizer, tokenizer.pad_token_id)
        hit, false = refused(model, tokenizer, list(harmful)), refused(model, tokenizer, list(harmless))
        print(
            f"epoch {epoch}: loss {loss:.3f}, validation refusals {hit:.1%} harmful, {false:.1%} harmless", flush=True
        )
        if hit - 2 * false > best:
            best = hit - 2 * false
            save(model, args.output)


if __name__ == "__main__":
    main()
