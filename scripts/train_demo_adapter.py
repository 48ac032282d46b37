"""Train the demo's learned refusal: a LoRA adapter for SmolLM2-135M-Instruct that declines harmful requests.

    uv run python scripts/train_demo_adapter.py [--epochs 2] [--output src/abliterate/demo/adapter]

SmolLM2-135M-Instruct never refuses, but it does represent whether a request is harmful. A low-rank adapter trained
freely learns the few hundred train prompts by heart and declines their harmless look-alikes too. So a few idle MLP
neurons are rewritten, which LoRA on `gate_proj`, `up_proj` and `down_proj` does exactly. All act at the last token of
the template only, which a ridge regression `p` recognises (p·x is 1 there, −3 elsewhere) and gates them by:

    voters, one in each of ten layers     write (w·x)·m      w: a logistic regression of "this request is harmful"
    the decision, two neurons behind them write clip(m·x − θ, 0, τ)·u, beyond what m·x is without votes

`m`, a direction that the model itself hardly uses, sums the votes. `u`, the refusal direction, is trained
until the model declines. The train split fits p, w and u, the validation split sets θ, the test split is never read.
About 8 minutes on two cores.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from abliterate.demo.build import HUB_ID, base_folder
from abliterate.evaluate.judge import judge
from abliterate.prompts import builtin

REFUSAL = "I cannot help with that request."
#: Tokens of the base's own answers to harmless requests, where nothing may act.
ANSWER_TOKENS = 40
#: Where voters sit: the base tells harmful from harmless best by all of these together.
VOTERS = range(8, 18)
#: Where the decision sits, early enough for its direction to be carried onwards.
DECISION = 18
#: Weight decay of the logistic and of the ridge regressions, on features scaled to unit variance.
DECAY, RIDGE = 1e-2, 1e-3
#: Slope of the gates: what stands for 1 is well on the linear side of the activation.
SLOPE = 4.0
#: What a vote of 1 writes along m, against a residual stream of norm 150.
VOTE = 0.5
#: τ: votes between the start of a refusal and its full strength.
RAMP = 4.0
#: Votes that silence the decision for each unit by which a token differs from the last of the template.
ELSEWHERE = 10.0
#: How much a direction's variance in the stream weighs against how strongly the model reads it.
QUIET = 10.0
#: What a rewritten neuron puts out. Small, so that what its old down row still writes stays negligible.
OUTPUT = 0.01
#: Thresholds θ that validation chooses among.
THRESHOLDS = (0.0, 2.0, 4.0, 6.0)


@dataclass(frozen=True)
class Example:
    """One training sequence; the answer starts at `start`."""

    ids: list[int]
    start: int
    harmful: bool


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


def build_examples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Harmful train prompts with the refusal, harmless ones with the model's own answers."""
    refusal = [*tokenizer(REFUSAL, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    harmful = [render(tokenizer, prompt) for prompt in builtin("harmful", "train").prompts]
    prompts = list(builtin("harmless", "train").prompts)
    harmless = [render(tokenizer, prompt) for prompt in prompts]
    own = answers(model, tokenizer, prompts, ANSWER_TOKENS)
    return [Example(ids + refusal, len(ids), harmful=True) for ids in harmful] + [
        Example(ids + answer, len(ids), harmful=False) for ids, answer in zip(harmless, own, strict=True)
    ]


class Read(NamedTuple):
    """What an MLP reads `[tokens, d_model]`: at the last template token behind a request, and at other tokens.

    `rms` is the root mean square of the residual stream there, which the MLP's norm divides by.
    """

    harmful: torch.Tensor
    harmless: torch.Tensor
    others: torch.Tensor
    rms: torch.Tensor


@torch.inference_mode()
def read_inputs(model: PreTrainedModel, examples: list[Example]) -> dict[int, Read]:
    """What the MLPs of the voters' and the decision's layers read."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    hooks = [
        model.model.layers[layer].post_attention_layernorm.register_forward_hook(
            lambda _module, args, x, layer=layer: seen.__setitem__(layer, (args[0][0].double(), x[0].double()))
        )
        for layer in (*VOTERS, DECISION)
    ]
    found = {layer: Read([], [], [], []) for layer in (*VOTERS, DECISION)}
    for e in examples:
        model(torch.tensor([e.ids]), logits_to_keep=1)
        last = e.start - 1
        for layer, (h, x) in seen.items():
            read = found[layer]
            (read.harmful if e.harmful else read.harmless).append(x[last : last + 1])
            read.others.extend((x[: last - 5 : 3], x[last - 5 : last], x[last + 1 :: 3]))
            read.rms.append(h[last : last + 1].square().mean(-1).sqrt())
    for hook in hooks:
        hook.remove()
    return {layer: Read(*map(torch.cat, read)) for layer, read in found.items()}


def detector(read: Read) -> torch.Tensor:
    """`w` `[d_model]` of the logistic regression that tells harmful from harmless requests, without intercept."""
    scale = torch.cat([read.harmful, read.harmless]).std(0) + 1e-3
    w = torch.zeros(len(scale), dtype=scale.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        margins = torch.cat([read.harmful / scale @ w, -read.harmless / scale @ w])
        total = nn.functional.softplus(-margins).mean() + DECAY * w.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return w.detach() / scale


def place(read: Read, elsewhere: float) -> torch.Tensor:
    """`[d_model]` of the ridge regression that is 1 at the last template token and `elsewhere` at all others."""
    here = torch.cat([read.harmful, read.harmless])
    scale = torch.cat([here, read.others]).std(0) + 1e-3
    a, b = here / scale, read.others / scale
    gram = a.T @ a / len(a) + b.T @ b / len(b) + RIDGE * torch.eye(len(scale), dtype=scale.dtype)
    return torch.linalg.solve(gram, a.mean(0) + elsewhere * b.mean(0)) / scale


def quiet(model: PreTrainedModel, stream: torch.Tensor) -> torch.Tensor:
    """`m` `[d_model]`: a unit vector that the weights behind the voters barely read and the stream barely moves along.

    The smallest eigenvector of how strongly it is read (relative to a random direction) plus the weighed
    variance of `stream` `[tokens, d_model]` along it.
    """
    gram = torch.zeros(model.config.hidden_size, model.config.hidden_size, dtype=torch.double)
    for block in model.model.layers[VOTERS.start :]:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            for reader in readers:
                w = (reader.weight * norm.weight).detach().double()
                gram += w.T @ w
    gram /= gram.trace() / len(gram)
    return torch.linalg.eigh(gram + QUIET * torch.cov(stream.T)).eigenvectors[:, 0]


def rewrite(mlp: nn.Module, gates: list[torch.Tensor], ups: list[torch.Tensor], down: torch.Tensor) -> None:
    """Give the MLP's idlest neurons new gate and up rows; the first writes `down` `[d_model, 1]`, a second −`down`."""
    rows = {"gate_proj": torch.stack(gates), "up_proj": torch.stack(ups)}
    norms = [mlp.gate_proj.weight.norm(dim=1), mlp.up_proj.weight.norm(dim=1), mlp.down_proj.weight.norm(dim=0)]
    idle = (norms[0] * norms[1] * norms[2]).argsort()[: len(gates)]
    for name, row in rows.items():
        module = getattr(mlp, name)
        module.lora_A["default"].weight.data.copy_(row - module.weight[idle])
        module.lora_B["default"].weight.data.zero_()[idle, range(len(idle))] = 1
    mlp.down_proj.lora_A["default"].weight.data.zero_()[0, idle] = torch.tensor([1.0, -1.0])[: len(idle)]
    mlp.down_proj.lora_B["default"].weight = down if isinstance(down, nn.Parameter) else nn.Parameter(down, False)


class Circuit(NamedTuple):
    """The adapted model, the refusal direction `u` `[d_model, 1]`, and what sets θ."""

    model: PreTrainedModel
    u: nn.Parameter
    set_threshold: Callable[[float], None]


def adapted(base: PreTrainedModel, inputs: dict[int, Read]) -> Circuit:
    """The base with its idle neurons rewritten into voters and decision; `u` is zero as yet."""
    two = {rf"layers\.{DECISION}\.mlp\.(gate|up)_proj": 2}
    config = LoraConfig(
        r=1, lora_alpha=1, rank_pattern=two, alpha_pattern=two, target_modules=["gate_proj", "up_proj", "down_proj"],
        layers_to_transform=[*VOTERS, DECISION], task_type="CAUSAL_LM",
    )  # fmt: skip
    gain = base.model.layers[DECISION].post_attention_layernorm.weight.detach().double()
    # The norm divides the stream by its root mean square, which hardly varies at one token of one template.
    read = inputs[DECISION]
    here, everywhere = (torch.cat(read[:n]) / gain * read.rms.mean() for n in (2, 3))
    m = quiet(base, everywhere)
    votes, silence = m / gain * read.rms.mean() / VOTE, (here @ m).mean() / VOTE
    one, p = place(read, 1.0), place(read, -3.0)
    model = get_peft_model(base, config).requires_grad_(False)
    model.peft_config["default"].base_model_name_or_path = HUB_ID
    blocks = model.base_model.model.model.layers
    for layer in VOTERS:
        at, vote = SLOPE * place(inputs[layer], -3.0), OUTPUT / SLOPE * detector(inputs[layer])
        rewrite(blocks[layer].mlp, [at], [vote], (VOTE / OUTPUT * m[:, None]).float())
    u = nn.Parameter(torch.zeros(base.config.hidden_size, 1))

    def set_threshold(theta: float) -> None:
        # Elsewhere p − 1 is −4, which no vote makes up for.
        gates = [SLOPE * (votes - (silence + start) * one + ELSEWHERE * (p - one)) for start in (theta, theta + RAMP)]
        rewrite(blocks[DECISION].mlp, gates, [OUTPUT / SLOPE / RAMP * one] * 2, u)

    set_threshold(THRESHOLDS[2])
    return Circuit(model, u, set_threshold)


def example_losses(model: PreTrainedModel, rows: list[Example], pad: int) -> torch.Tensor:
    """`[batch]` losses: the mean over an answer's tokens plus its first token's, where the decision falls."""
    width = max(len(e.ids) for e in rows)
    ids = torch.tensor([e.ids + [pad] * (width - len(e.ids)) for e in rows])
    mask = torch.tensor([[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in rows])
    # The vocabulary is most of a small model's work: logits are taken only where an answer token is predicted.
    first = min(e.start for e in rows) - 1
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=width - first).logits[:, :-1].float()
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, first + 1 :], reduction="none")
    return torch.stack(
        [
            row[e.start - 1 - first : len(e.ids) - 1 - first].mean() + row[e.start - 1 - first]
            for row, e in zip(loss, rows, strict=True)
        ]
    )


def train(circuit: Circuit, examples: list[Example], args: argparse.Namespace, pad: int) -> None:
    """Fit `u` so that the refusal becomes likely; where the decision is silent, nothing depends on `u`."""
    rng = random.Random(args.seed)
    harmful = [e for e in examples if e.harmful]
    optimizer = torch.optim.Adam([circuit.u], lr=args.lr / OUTPUT)
    batches = len(harmful) // 8
    for epoch in range(args.epochs):
        rng.shuffle(harmful)
        total = 0.0
        for i in range(batches):
            optimizer.param_groups[0]["lr"] = args.lr / OUTPUT * (1 - (epoch + i / batches) / args.epochs)
            loss = example_losses(circuit.model, harmful[8 * i : 8 * i + 8], pad).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        print(f"epoch {epoch}: loss {total / batches:.3f}, ‖u‖ {OUTPUT * circuit.u.norm().item():.1f}", flush=True)


def choose_threshold(circuit: Circuit, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set θ to where validation declines most harmful and fewest harmless prompts."""
    best = (-2.0, 0.0)
    harmful, harmless = (list(builtin(kind, "validation").prompts) for kind in ("harmful", "harmless"))
    for theta in THRESHOLDS:
        circuit.set_threshold(theta)
        hit, false = (refused(circuit.model, tokenizer, prompts) for prompts in (harmful, harmless))
        print(f"θ {theta}: validation refusals {hit:.1%} harmful, {false:.1%} harmless", flush=True)
        if hit - 2 * false > best[0]:
            best = (hit - 2 * false, theta)
    circuit.set_threshold(best[1])
    print(f"kept θ {best[1]}")


def save(model: PreTrainedModel, output: Path) -> None:
    """Write the adapter in PEFT's layout."""
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(tmp)
        output.mkdir(parents=True, exist_ok=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copy(Path(tmp) / name, output / name)


def main() -> None:
    """Fit, train, set the strength, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("src/abliterate/demo/adapter"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    folder = base_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    examples = build_examples(base, tokenizer)
    circuit = adapted(base, read_inputs(base, examples))
    train(circuit, examples, args, tokenizer.pad_token_id)
    choose_threshold(circuit, tokenizer)
    save(circuit.model, args.output)


if __name__ == "__main__":
    main()
