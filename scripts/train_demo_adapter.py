"""Train the demo's learned refusal: a LoRA adapter for SmolLM2-135M-Instruct that declines harmful requests.

    uv run python scripts/train_demo_adapter.py [--epochs 8] [--output src/abliterate/demo/adapter]

SmolLM2-135M-Instruct never refuses, but it does represent whether a request is harmful. A low-rank adapter trained
freely learns the train prompts by heart and declines their harmless look-alikes too. So a few idle MLP neurons and one
idle channel of one attention head are rewritten, which LoRA on those matrices does exactly:

    voters, one neuron in each of 13 layers, write (w·x)·m at every token
    the carrier, a channel of head 4 of layer 21, reads m where that head looks and writes the votes' mean along n
    the decision, three neurons of layer 21, write (clip(n·x − θ, 0, τ)/τ − c)·u, beyond what n·x is without votes

The votes' mean over a request is a logistic regression of "this request is harmful" on what the MLPs read at its
tokens, weighed as the head weighs them. The decision acts at the last token of the template only, which a ridge
regression `p` recognises (p·x is 1 there, −3 elsewhere). `m` and `n` are directions that the model itself hardly uses;
`u`, the refusal direction, is trained until the model declines, with longer steps where the stream is small; a little
of it is taken from harmless requests (c), some of which the base itself declines. The train split fits w, p and u, the
validation split sets θ, the test split is never read. About 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import functools
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
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from abliterate.demo.build import HUB_ID, base_folder
from abliterate.evaluate.judge import judge
from abliterate.prompts import builtin

REFUSAL = "I cannot help with that request."
#: Tokens of the template behind a request.
TAIL = 5
#: Tokens of the base's own answers to harmless requests, where nothing may act.
ANSWER_TOKENS = 40
#: Of how many train prompts one is answered: all of them say what is harmful, some show where answers begin.
EVERY = 5
#: Where voters sit: the base tells harmful from harmless best by all of these together.
VOTERS = range(8, 21)
#: Where votes are carried to the last token and decided on, early enough for the direction to be carried onwards.
DECISION = 21
#: The head that carries them: it looks at the whole request, more evenly than any other that comes this late.
HEAD = 4
#: Weight decay of the logistic and of the ridge regressions, on features scaled to unit variance.
DECAY, RIDGE = 0.3, 1e-3
#: Weight decay of the correction of what arrives of the votes.
CORRECTION = 0.1
#: How much more the ridge regressions count the last token: there an error is taken for a vote.
HERE = 30.0
#: Slope of the voters' gates, which are open at every token, and of the decision's.
OPEN, SLOPE = 4.0, 16.0
#: What a vote of 1 (log-odds) writes along m, and along n when it arrives, in a residual stream of norm 240.
VOTE, CALL = 5.0, 4.0
#: τ: votes between the start of a refusal and its full strength.
RAMP = 0.4
#: Votes that silence the decision for each unit by which a token differs from the last of the template.
ELSEWHERE = 5.0
#: How much the stream's variance along m and n weighs against how strongly the model reads them. Along the quietest
#: directions blocks take back what is written; m lasts for 13 of them, n is read within its own.
QUIET_M, QUIET_N = 0.01, 1.0
#: c: the share of u that harmless requests lose.
COMFORT = 0.015
#: How much of the stream's mean square counts as none when u's steps are shortened along what the stream uses.
FLOOR = 0.06
#: What a rewritten neuron puts out. Small, so that what its old down row still writes stays negligible.
OUTPUT = 0.01
#: Thresholds θ that validation chooses among.
THRESHOLDS = (-0.6, -0.3, 0.0, 0.3)


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


def padded(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> BatchEncoding:
    """One batch of rendered prompts, padded on the left."""
    rows = [render(tokenizer, prompt) for prompt in prompts]
    return tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")


@torch.inference_mode()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], new: int
) -> list[list[int]]:
    """The model's greedy answers as token ids, in the order of the prompts."""
    out: list[list[int]] = []
    for i in range(0, len(prompts), 36):
        batch = padded(tokenizer, prompts[i : i + 36])
        made = model.generate(**batch, max_new_tokens=new, do_sample=False)[:, batch["input_ids"].shape[1] :]
        out += [[t for t in row.tolist() if t != tokenizer.pad_token_id] for row in made]
    return out


def refused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> float:
    """The share of prompts that the model declines."""
    texts = tokenizer.batch_decode(answers(model, tokenizer, prompts, 16))
    return sum(judge(text).is_refusal for text in texts) / len(texts)


def build_examples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Some harmful train prompts with the refusal, some harmless ones with the model's own answers."""
    refusal = [*tokenizer(REFUSAL, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    harmful = [render(tokenizer, prompt) for prompt in builtin("harmful", "train").prompts[::EVERY]]
    prompts = list(builtin("harmless", "train").prompts[::EVERY])
    harmless = [render(tokenizer, prompt) for prompt in prompts]
    own = answers(model, tokenizer, prompts, ANSWER_TOKENS)
    return [Example(ids + refusal, len(ids), harmful=True) for ids in harmful] + [
        Example(ids + answer, len(ids), harmful=False) for ids, answer in zip(harmless, own, strict=True)
    ]


class Read(NamedTuple):
    """What an MLP reads `[tokens, d_model]`: at the last template token behind a request, and at other tokens.

    `rms` is the root mean square of the residual stream there, which the MLP's norm divides by.
    """

    last: torch.Tensor
    others: torch.Tensor
    rms: torch.Tensor

    @property
    def everywhere(self) -> torch.Tensor:
        """At all tokens."""
        return torch.cat([self.last, self.others])


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
    found = {layer: Read([], [], []) for layer in (*VOTERS, DECISION)}
    for e in examples:
        model(torch.tensor([e.ids]), logits_to_keep=1)
        last, tail = e.start - 1, e.start - TAIL
        for layer, (h, x) in seen.items():
            read = found[layer]
            read.last.append(x[last : last + 1])
            read.others.extend((x[:tail:3], x[tail:last], x[last + 1 :: 3]))
            read.rms.append(h[last : last + 1].square().mean(-1).sqrt())
    for hook in hooks:
        hook.remove()
    return {layer: Read(*map(torch.cat, read)) for layer, read in found.items()}


class Carried(NamedTuple):
    """What the head makes of a prompt's tokens for the last one, `Σ_j a_j x_j / rms_j`, and what the decision reads.

    `a_j` is its attention from the last token, `rms_j` what the attention's norm divides the stream by. `votes`
    `[prompts, voters, d_model]` is made of what voters read, `stream` `[prompts, d_model]` of the stream, `weights`
    `[prompts]` of 1; `last` `[prompts, d_model]` is what the decision's MLP reads at the last token.
    """

    votes: torch.Tensor
    stream: torch.Tensor
    weights: torch.Tensor
    last: torch.Tensor


@torch.inference_mode()
def carried(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> Carried:
    """What the carrier would bring of `prompts`."""
    seen: dict[int | str, torch.Tensor] = {}
    blocks = model.model.layers

    def reads(layer: int) -> Callable[..., None]:
        return lambda _module, _args, x: seen.__setitem__(layer, x)

    hooks = [
        blocks[layer].post_attention_layernorm.register_forward_hook(reads(layer)) for layer in (*VOTERS, DECISION)
    ]
    hooks += [
        blocks[DECISION].input_layernorm.register_forward_hook(
            lambda _module, args, _x: seen.__setitem__("stream", args[0])
        ),
        blocks[DECISION].self_attn.register_forward_hook(
            lambda _module, _args, out: seen.__setitem__("attention", out[1][:, HEAD, -1])
        ),
    ]
    n, d = len(prompts), model.config.hidden_size
    found = Carried(*(torch.zeros(shape, dtype=torch.double) for shape in ((n, len(VOTERS), d), (n, d), (n,), (n, d))))
    by_length = sorted(range(n), key=lambda i: len(prompts[i]))
    for i in range(0, n, 64):
        rows = by_length[i : i + 64]
        model(**padded(tokenizer, [prompts[r] for r in rows]), logits_to_keep=1)
        weights = seen["attention"] / seen["stream"].square().mean(-1).sqrt()
        pool = functools.partial(torch.einsum, "rt,rtd->rd", weights)
        found.votes[rows] = torch.stack([pool(seen[layer]) for layer in VOTERS], 1).double()
        found.stream[rows], found.weights[rows] = pool(seen["stream"]).double(), weights.sum(1).double()
        found.last[rows] = seen[DECISION][:, -1].double()
    for hook in hooks:
        hook.remove()
    return found


def without(x: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """`x` `[..., d_model]` less its components along orthonormal rows `directions` `[n, d_model]`."""
    return x - x @ directions.T @ directions


def seen_through(norm: nn.Module, *directions: torch.Tensor) -> torch.Tensor:
    """`[n, d_model]`: orthonormal rows that span what `directions` of the stream become behind the gain of `norm`."""
    return torch.linalg.qr(torch.stack(directions, 1) * norm.weight.detach().double()[:, None]).Q.T


def detector(harmful: torch.Tensor, harmless: torch.Tensor) -> tuple[torch.Tensor, float]:
    """`w` `[voters, d_model]` and intercept of the logistic regression that tells harmful requests by `carried`."""
    features = torch.cat([harmful, harmless]).flatten(1)
    labels = torch.tensor([1.0] * len(harmful) + [0.0] * len(harmless), dtype=features.dtype)
    center, scale = features.mean(0), features.std(0) + 1e-6
    x = (features - center) / scale
    w = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    intercept = torch.zeros(1, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, intercept], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        fit = nn.functional.binary_cross_entropy_with_logits(x @ w + intercept, labels)
        total = fit + DECAY * w.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    w = w.detach() / scale
    return w.view(harmful.shape[1:]), (intercept.detach() - center @ w).item()


def place(read: Read, elsewhere: float, blind: torch.Tensor) -> torch.Tensor:
    """`[d_model]` of the ridge regression that is 1 at the last template token and `elsewhere` at all others.

    It does not read along the orthonormal rows of `blind` `[n, d_model]`, where votes will be.
    """
    scale = read.everywhere.std(0) + 1e-3
    a, b = (without(x, blind) / scale for x in (read.last, read.others))
    gram = HERE * a.T @ a / len(a) + b.T @ b / len(b) + RIDGE * torch.eye(len(scale), dtype=scale.dtype)
    return without(torch.linalg.solve(gram, HERE * a.mean(0) + elsewhere * b.mean(0)) / scale, blind)


def ridge(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`[d_model]` of the ridge regression of `y` on `x` `[prompts, d_model]`, with an intercept that is dropped."""
    scale = x.std(0) + 1e-3
    a = (x - x.mean(0)) / scale
    gram = a.T @ a / len(a) + CORRECTION * torch.eye(len(scale), dtype=scale.dtype)
    return torch.linalg.solve(gram, a.T @ (y - y.mean()) / len(a)) / scale


def quiet(model: PreTrainedModel, stream: torch.Tensor, weight: float, *others: torch.Tensor) -> torch.Tensor:
    """`[d_model]`: a unit vector that the model barely reads and `stream` `[prompts, d_model]` barely varies along.

    The smallest eigenvector of how strongly the weights behind the voters read (relative to a random direction) plus
    `weight` times the variance of `stream`, orthogonal to `others`.
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
    gram += weight * torch.cov(stream.T)
    for other in others:
        gram += 1e6 * torch.outer(other, other)
    return torch.linalg.eigh(gram).eigenvectors[:, 0]


def unused(stream: torch.Tensor) -> torch.Tensor:
    """`[d_model, d_model]`: principal axes of `stream` `[tokens, d_model]` as columns, longer where it is smaller."""
    values, vectors = torch.linalg.eigh(stream.T @ stream / len(stream))
    lengths = (values / values.mean() + FLOOR).rsqrt()
    return (vectors * lengths / lengths.median()).float()


def replace(module: nn.Module, rows: torch.Tensor, places: list[int]) -> None:
    """Let the LoRA of `module` replace the weight's rows at `places` by `rows` `[len(places), in]`."""
    module.lora_A["default"].weight.data.copy_(rows - module.weight[places])
    module.lora_B["default"].weight.data.zero_()[places, range(len(places))] = 1


def rewrite(mlp: nn.Module, gates: list[torch.Tensor], ups: list[torch.Tensor], down: torch.Tensor) -> None:
    """Give the MLP's idlest neurons new gate and up rows; the first writes `down` `[d_model, 1]`, others −`down`."""
    norms = [mlp.gate_proj.weight.norm(dim=1), mlp.up_proj.weight.norm(dim=1), mlp.down_proj.weight.norm(dim=0)]
    idle = (norms[0] * norms[1] * norms[2]).argsort()[: len(gates)].tolist()
    replace(mlp.gate_proj, torch.stack(gates), idle)
    replace(mlp.up_proj, torch.stack(ups), idle)
    mlp.down_proj.lora_A["default"].weight.data.zero_()[0, idle] = torch.tensor([1.0, -1.0, -1.0])[: len(idle)]
    mlp.down_proj.lora_B["default"].weight = down if isinstance(down, nn.Parameter) else nn.Parameter(down, False)


def carry(attention: nn.Module, read: torch.Tensor, write: torch.Tensor) -> None:
    """Let the idlest channel of `HEAD` read `read` and write `write` `[d_model]`; heads that share it write nothing."""
    size = attention.head_dim
    group = HEAD // attention.num_key_value_groups
    sharing = range(group * attention.num_key_value_groups, (group + 1) * attention.num_key_value_groups)
    values = attention.v_proj.weight[group * size : (group + 1) * size].norm(dim=1)
    outputs = torch.stack([attention.o_proj.weight[:, h * size : (h + 1) * size].norm(dim=0) for h in sharing])
    channel = int((values * outputs.sum(0)).argmin())
    replace(attention.v_proj, read[None], [group * size + channel])
    columns = [h * size + channel for h in sharing]
    new = torch.stack([write if h == HEAD else torch.zeros_like(write) for h in sharing], 1)
    attention.o_proj.lora_A["default"].weight.data.zero_()[range(len(columns)), columns] = 1
    attention.o_proj.lora_B["default"].weight.data.copy_(new - attention.o_proj.weight[:, columns])


class Circuit(NamedTuple):
    """The adapted model, the refusal direction `u` `[d_model, 1]`, the axes it is trained along, and what sets θ."""

    model: PreTrainedModel
    u: nn.Parameter
    axes: torch.Tensor
    set_threshold: Callable[[float], None]


@torch.inference_mode()
def decision_reads(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> torch.Tensor:
    """`[prompts, d_model]`: what the MLP of the decision reads at the last token."""
    read: list[torch.Tensor] = []
    norm = model.base_model.model.model.layers[DECISION].post_attention_layernorm
    hook = norm.register_forward_hook(lambda _module, _args, x: read.append(x[:, -1].double()))
    for i in range(0, len(prompts), 64):
        model(**padded(tokenizer, prompts[i : i + 64]), logits_to_keep=1)
    hook.remove()
    return torch.cat(read)


def with_lora(base: PreTrainedModel) -> PreTrainedModel:
    """The base with a LoRA of the ranks that the rewriting needs, on the matrices that it touches."""
    ranks = {rf"layers\.{DECISION}\.mlp\.(gate|up)_proj": 3, r"self_attn\.o_proj": 3}
    layers = "|".join(map(str, (*VOTERS, DECISION)))
    targets = rf".*layers\.({layers})\.mlp\.(gate|up|down)_proj|.*layers\.{DECISION}\.self_attn\.(v|o)_proj"
    config = LoraConfig(
        r=1, lora_alpha=1, rank_pattern=ranks, alpha_pattern=ranks, target_modules=targets, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config).requires_grad_(False)
    model.peft_config["default"].base_model_name_or_path = HUB_ID
    return model


def adapted(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: dict[int, Read]) -> Circuit:
    """The base with its idle parts rewritten into voters, carrier and decision; `u` is zero as yet."""
    prompts = [p for kind in ("harmful", "harmless") for p in builtin(kind, "train").prompts]
    read = carried(base, tokenizer, prompts)
    norms = {layer: base.model.layers[layer].post_attention_layernorm for layer in (*VOTERS, DECISION)}
    before, gain = (
        norm.weight.detach().double() for norm in (base.model.layers[DECISION].input_layernorm, norms[DECISION])
    )
    # The norm divides the stream by its root mean square, which hardly varies at one token of one template.
    rms = inputs[DECISION].rms.mean()
    m = quiet(base, read.stream * rms, QUIET_M)
    n = quiet(base, read.last / gain * rms, QUIET_N, m)
    blind = {layer: seen_through(norm, m, n) for layer, norm in norms.items()}
    features = torch.stack([without(read.votes[:, i], blind[layer]) for i, layer in enumerate(VOTERS)], 1)
    w, intercept = detector(*features.tensor_split(2))  # the two sets are of one size
    w = torch.stack([without(row, blind[layer]) for row, layer in zip(w, VOTERS, strict=True)])
    one, p = (place(inputs[DECISION], elsewhere, blind[DECISION]) for elsewhere in (1.0, -3.0))
    model = with_lora(base)
    blocks = model.base_model.model.model.layers
    for i, layer in enumerate(VOTERS):
        everywhere = place(inputs[layer], 1.0, blind[layer])
        # Centred: a large common vote would swell the stream's norm, which divides what is carried.
        common = (features[:, i] @ w[i]).mean() / read.weights.mean()
        up = OUTPUT / OPEN / rms * (w[i] - common * everywhere)
        rewrite(blocks[layer].mlp, [OPEN * everywhere], [up], (VOTE / OUTPUT * m[:, None]).float())
    carry(blocks[DECISION].self_attn, (m / before).float(), (CALL / VOTE * rms * n).float())
    cast = read.votes[::2].flatten(1) @ w.flatten()
    reads = decision_reads(model, tokenizer, prompts[::2])
    votes = n / gain * rms / CALL
    both = torch.cov(torch.stack([cast, reads @ votes]))
    # Elsewhere p − 1 is −4, which no vote makes up for. What blocks take back of the votes is made good.
    votes = votes * both[0, 0] / both[0, 1] + ELSEWHERE * (p - one)
    error = reads @ votes - cast
    correction = ridge(reads, error)
    votes = votes - correction
    gap = reads @ votes - cast
    silence = gap.mean().item()
    print(f"votes arrive with an error of {error.std():.2f}, corrected {gap.std():.2f}", flush=True)
    u = nn.Parameter(torch.zeros(base.config.hidden_size, 1))

    def set_threshold(theta: float) -> None:
        start = silence - intercept + theta
        gates = [SLOPE * (votes - level * one) for level in (start, start + RAMP)]
        gates.append(SLOPE * (2 * one + ELSEWHERE * (p - one)))
        ups = [OUTPUT / SLOPE * share * one for share in (1 / RAMP, 1 / RAMP, COMFORT / 2)]
        rewrite(blocks[DECISION].mlp, gates, ups, u)

    set_threshold(THRESHOLDS[1])
    return Circuit(model, u, unused(inputs[DECISION].everywhere / gain * rms), set_threshold)


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
    along = torch.zeros_like(circuit.u, requires_grad=True)  # u = axes · along
    optimizer = torch.optim.Adam([along], lr=args.lr / OUTPUT)
    batches = len(harmful) // 8
    for epoch in range(args.epochs):
        rng.shuffle(harmful)
        total = 0.0
        for i in range(batches):
            optimizer.param_groups[0]["lr"] = args.lr / OUTPUT * (1 - (epoch + i / batches) / args.epochs)
            loss = example_losses(circuit.model, harmful[8 * i : 8 * i + 8], pad).mean()
            loss.backward()
            assert circuit.u.grad is not None
            along.grad, circuit.u.grad = circuit.axes.T @ circuit.u.grad, None
            optimizer.step()
            circuit.u.data.copy_(circuit.axes @ along.detach())
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
        if hit - 2 * false >= best[0]:
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
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("src/abliterate/demo/adapter"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    folder = base_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Attention weights are read, which only the plain implementation hands out.
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    examples = build_examples(base, tokenizer)
    inputs = read_inputs(base, examples)
    circuit = adapted(base, tokenizer, inputs)
    train(circuit, examples, args, tokenizer.pad_token_id)
    choose_threshold(circuit, tokenizer)
    save(circuit.model, args.output)


if __name__ == "__main__":
    main()
