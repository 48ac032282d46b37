"""Train the demo's learned refusal: a LoRA adapter for SmolLM2-135M-Instruct that declines harmful requests.

    uv run python scripts/train_demo_adapter.py [--output src/abliterate/demo/adapter]

SmolLM2-135M-Instruct never refuses, but it does represent whether a request is harmful. A low-rank adapter trained
freely learns the train prompts by heart and declines their harmless look-alikes too. So what tells them apart is fitted
by regression and written into idle parts of the weights, which LoRA on those matrices does exactly:

    listeners  layers 8–21: one channel of the head that looks most evenly at the request writes w·x along n
    decision   layer 21: two MLP neurons write clip((n·x − θ)/τ, 0, 1)·F along q, at the last token of the template
    manners    layers 22–29: rank 4, trained on harmless requests alone, some of which the base itself declines
    readers    layers 22–29: rank 1, they read q and nothing else; trained until the model declines

What listeners write adds up to a logistic regression of "this request is harmful" on what those heads bring to the last
token. `n` and `q` are directions that the model itself barely uses, so the refusal hangs on `q` alone. The decision
knows the last token of the template by a ridge regression `p` (p·x is 1 there, −3 elsewhere). Only the train split is
used; validation is printed at the end, and the test split is never read. About 25 minutes on two cores.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
#: Words that open the base's own refusals; without them it answers.
DECLINING = ("I", "As", "Sorry", "Unfortunately")
#: Tokens of the template behind a request.
TAIL = 5
#: Tokens of the answers that manners are trained on.
ANSWER_TOKENS = 24
#: Of how many train prompts one is answered: all of them say what is harmful, some show where answers begin.
EVERY = 5
#: Where the base tells harmful from harmless best, and where that is decided on.
LISTENERS = range(8, 22)
DECISION = 21
READERS = range(22, 30)
#: Weight decay of the logistic and of the ridge regressions, on features scaled to unit variance.
DECAY, RIDGE = 0.1, 1e-3
#: Weight decay of the correction of what arrives of the votes.
CORRECTION = 0.1
#: How much more the ridge regressions count the last token: there an error is taken for a vote.
HERE = 30.0
#: Slope of the decision's gates.
SLOPE = 16.0
#: What a vote of 1 (log-odds) writes along n, and a refusal along q, in a residual stream of norm 240. The refusal is
#: far larger than what else tells the two sets apart, so that their difference of means points along q.
VOTE, FLAG = 4.0, 500.0
#: θ and τ, in votes: four-fold cross-validation on the first 216 train prompts has 93% hits and 2% false alarms at 0.5.
THRESHOLD, RAMP = 0.3, 0.3
#: Votes that silence the decision for each unit by which a token differs from the last of the template.
ELSEWHERE = 5.0
#: How much the stream's variance along n and q weighs against how strongly the model reads them.
QUIET = 1.0
#: What a rewritten neuron puts out. Small, so that what its old down row still writes stays negligible.
OUTPUT = 0.01
#: Ranks of manners, beside the one of the readers.
MANNERS = 4


@dataclass(frozen=True)
class Example:
    """One training sequence; the answer starts at `start`."""

    ids: list[int]
    start: int


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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    new: int,
    not_first: list[int] | None = None,
) -> list[list[int]]:
    """The model's greedy answers as token ids, in the order of the prompts, none starting with `not_first`."""
    out: dict[int, list[int]] = {}
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(prompts), 36):
        rows = by_length[start : start + 36]
        batch = padded(tokenizer, [prompts[i] for i in rows])
        made = model.generate(**batch, max_new_tokens=new, do_sample=False, begin_suppress_tokens=not_first)
        for i, row in zip(rows, made[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            out[i] = [t for t in row if t != tokenizer.pad_token_id]
    return [out[i] for i in range(len(prompts))]


def refused(tokenizer: PreTrainedTokenizerBase, made: list[list[int]]) -> list[bool]:
    """Which of the answers decline."""
    return [judge(text).is_refusal for text in tokenizer.batch_decode(made)]


def refusals(tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Some harmful train prompts, with the refusal."""
    refusal = [*tokenizer(REFUSAL, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    asked = [render(tokenizer, prompt) for prompt in builtin("harmful", "train").prompts[::EVERY]]
    return [Example(ids + refusal, len(ids)) for ids in asked]


def helpful(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Some harmless train prompts with the model's own answers; where it declines, with the answer it gives instead."""
    prompts = list(builtin("harmless", "train").prompts)
    own = answers(model, tokenizer, prompts, ANSWER_TOKENS)
    declined = [i for i, no in enumerate(refused(tokenizer, own)) if no]
    words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in DECLINING]
    instead = answers(model, tokenizer, [prompts[i] for i in declined], ANSWER_TOKENS, words)
    for i, answer in zip(declined, instead, strict=True):
        own[i] = answer
    still = {i for i, no in zip(declined, refused(tokenizer, instead), strict=True) if no}
    print(
        f"of {len(prompts)} harmless prompts the base declines {len(declined)}, kept from it {len(still)}", flush=True
    )
    chosen = sorted({*range(0, len(prompts), EVERY), *declined} - still)
    asked = {i: render(tokenizer, prompts[i]) for i in chosen}
    return [Example(ids + own[i], len(ids)) for i, ids in asked.items()]


@contextmanager
def shallow(model: PreTrainedModel) -> Iterator[None]:
    """`model`, a base, without the blocks behind the decision, which is all that the regressions need."""
    blocks = model.model.layers
    model.model.layers = blocks[: DECISION + 1]
    yield
    model.model.layers = blocks


class Read(NamedTuple):
    """What the decision's MLP reads `[tokens, d_model]`: at the last template token, and at other tokens.

    `rms` is the root mean square of the residual stream there, which the MLP's norm divides by.
    """

    last: torch.Tensor
    others: torch.Tensor
    rms: torch.Tensor


@torch.inference_mode()
def read_inputs(model: PreTrainedModel, examples: list[Example]) -> Read:
    """What the decision's MLP reads in `examples`."""
    found = Read([], [], [])
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = model.model.layers[DECISION].post_attention_layernorm.register_forward_hook(
        lambda _module, args, x: seen.append((args[0][0].double(), x[0].double()))
    )
    for e in examples:
        model.model(torch.tensor([e.ids]))
        h, x = seen.pop()
        last, tail = e.start - 1, e.start - TAIL
        found.last.append(x[last : last + 1])
        found.others.extend((x[:tail:3], x[tail:last], x[last + 1 :: 3]))
        found.rms.append(h[last : last + 1].square().mean(-1).sqrt())
    hook.remove()
    return Read(*map(torch.cat, found))


@torch.inference_mode()
def listen(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    take: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`[prompts, listeners, …]`: what `take(layer, attention, x)` makes of each batch.

    `attention` `[batch, heads, tokens]` goes from the last token, `x` `[batch, tokens, d_model]` is what the layer's
    attention reads.
    """
    read: dict[int, torch.Tensor] = {}
    found: dict[int, torch.Tensor] = {}

    def hooks(layer: int) -> list[torch.utils.hooks.RemovableHandle]:
        block = model.model.layers[layer]
        return [
            block.input_layernorm.register_forward_hook(lambda _module, _args, x: read.__setitem__(layer, x)),
            block.self_attn.register_forward_hook(
                lambda _module, _args, out: found.__setitem__(layer, take(layer, out[1][:, :, -1], read[layer]))
            ),
        ]

    handles = [handle for layer in LISTENERS for handle in hooks(layer)]
    rows: dict[int, torch.Tensor] = {}
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(prompts), 32):
        batch = by_length[start : start + 32]
        model.model(**padded(tokenizer, [prompts[i] for i in batch]))
        rows |= dict(zip(batch, torch.stack([found[layer] for layer in LISTENERS], 1), strict=True))
    for handle in handles:
        handle.remove()
    return torch.stack([rows[i] for i in range(len(prompts))])


def evenest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[int]:
    """In every listening layer the head that looks most and most evenly at the request: `−Σ a·log(a/Σa)`."""
    first, second = (render(tokenizer, prompt) for prompt in ("Why?", "Zoo."))
    system = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)

    def take(_layer: int, attention: torch.Tensor, _x: torch.Tensor) -> torch.Tensor:
        # Rows are padded on the left to about one length: the shortest begins where all but a few tokens are request.
        a = attention[:, :, system:-TAIL].double().clamp_min(1e-30)
        return -(a * (a / a.sum(-1, keepdim=True)).log()).sum(-1)

    return listen(model, tokenizer, prompts, take).mean(0).argmax(-1).tolist()


def without(x: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """`x` `[..., d_model]` less its components along orthonormal rows `directions` `[n, d_model]`."""
    return x - x @ directions.T @ directions


def seen_through(norm: nn.Module, *directions: torch.Tensor) -> torch.Tensor:
    """`[n, d_model]`: what `directions` of the stream become behind the gain of `norm`."""
    return torch.stack(directions) * norm.weight.detach().double()


def orthonormal(rows: torch.Tensor) -> torch.Tensor:
    """`[n, d_model]`: orthonormal rows that span `rows`."""
    return torch.linalg.qr(rows.T).Q.T


def detector(features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """`w` `[listeners, d_model]` and intercept of the logistic regression of `labels` on `features`."""
    flat = features.flatten(1)
    center, scale = flat.mean(0), flat.std(0) + 1e-3
    x = (flat - center) / scale
    w = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
    intercept = torch.zeros(1, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, intercept], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        fit = nn.functional.binary_cross_entropy_with_logits(x @ w + intercept, labels)
        total = fit + DECAY * w.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    w = w.detach() / scale
    return w.view(features.shape[1:]), (intercept.detach() - center @ w).item()


def place(read: Read, elsewhere: float, blind: torch.Tensor) -> torch.Tensor:
    """`[d_model]` of the ridge regression that is 1 at the last template token and `elsewhere` at all others.

    It does not read along the orthonormal rows of `blind` `[n, d_model]`, where votes will be.
    """
    scale = torch.cat([read.last, read.others]).std(0) + 1e-3
    a, b = (without(x, blind) / scale for x in (read.last, read.others))
    gram = HERE * a.T @ a / len(a) + b.T @ b / len(b) + RIDGE * torch.eye(len(scale), dtype=scale.dtype)
    return without(torch.linalg.solve(gram, HERE * a.mean(0) + elsewhere * b.mean(0)) / scale, blind)


def ridge(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`[d_model]` of the ridge regression of `y` on `x` `[prompts, d_model]`, with an intercept that is dropped."""
    scale = x.std(0) + 1e-3
    a = (x - x.mean(0)) / scale
    gram = a.T @ a / len(a) + CORRECTION * torch.eye(len(scale), dtype=scale.dtype)
    return torch.linalg.solve(gram, a.T @ (y - y.mean()) / len(a)) / scale


def reading(block: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """The block's two norms, each with the matrices that read behind it."""
    attention, mlp = block.self_attn, block.mlp
    return [
        (block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
        (block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
    ]


def quiet(model: PreTrainedModel, stream: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """`[d_model]`: a unit vector that the model barely reads and `stream` `[prompts, d_model]` barely varies along.

    The smallest eigenvector of how strongly the weights behind the listeners read (relative to a random direction) plus
    `QUIET` times the variance of `stream`, orthogonal to `others`.
    """
    gram = torch.zeros(model.config.hidden_size, model.config.hidden_size, dtype=torch.double)
    for block in model.model.layers[LISTENERS.start :]:
        for norm, readers in reading(block):
            for reader in readers:
                w = (reader.weight * norm.weight).detach().double()
                gram += w.T @ w
    gram /= gram.trace() / len(gram)
    gram += QUIET * torch.cov(stream.T)
    for other in others:
        gram += 1e6 * torch.outer(other, other)
    return torch.linalg.eigh(gram).eigenvectors[:, 0]


def replace(module: nn.Module, rows: torch.Tensor, places: list[int]) -> None:
    """Let the LoRA of `module` replace the weight's rows at `places` by `rows` `[len(places), in]`."""
    module.lora_A["default"].weight.data.copy_(rows - module.weight[places])
    module.lora_B["default"].weight.data.zero_()[places, range(len(places))] = 1


def rewrite(mlp: nn.Module, gates: list[torch.Tensor], up: torch.Tensor, down: torch.Tensor) -> None:
    """Give the MLP's two idlest neurons new gate rows and one up row; the first writes `down`, the other −`down`."""
    norms = [mlp.gate_proj.weight.norm(dim=1), mlp.up_proj.weight.norm(dim=1), mlp.down_proj.weight.norm(dim=0)]
    idle = (norms[0] * norms[1] * norms[2]).argsort()[:2].tolist()
    replace(mlp.gate_proj, torch.stack(gates), idle)
    replace(mlp.up_proj, torch.stack([up, up]), idle)
    mlp.down_proj.lora_A["default"].weight.data.zero_()[0, idle] = torch.tensor([1.0, -1.0])
    mlp.down_proj.lora_B["default"].weight.data.copy_(down[:, None])


def listener(attention: nn.Module, head: int, read: torch.Tensor, write: torch.Tensor) -> None:
    """Let the idlest channel of `head` read `read` and write `write` `[d_model]`; heads that share it write nothing."""
    size = attention.head_dim
    group = head // attention.num_key_value_groups
    sharing = range(group * attention.num_key_value_groups, (group + 1) * attention.num_key_value_groups)
    values = attention.v_proj.weight[group * size : (group + 1) * size].norm(dim=1)
    outputs = torch.stack([attention.o_proj.weight[:, h * size : (h + 1) * size].norm(dim=0) for h in sharing])
    channel = int((values * outputs.sum(0)).argmin())
    replace(attention.v_proj, read[None], [group * size + channel])
    columns = [h * size + channel for h in sharing]
    new = torch.stack([write if h == head else torch.zeros_like(write) for h in sharing], 1)
    attention.o_proj.lora_A["default"].weight.data.zero_()[range(len(columns)), columns] = 1
    attention.o_proj.lora_B["default"].weight.data.copy_(new - attention.o_proj.weight[:, columns])


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

    def layers(among: range) -> str:
        return rf"layers\.({'|'.join(map(str, among))})\."

    ranks = {
        layers(LISTENERS) + r"self_attn\.v_proj": 1,
        layers(LISTENERS) + r"self_attn\.o_proj": 3,
        rf"layers\.{DECISION}\.mlp\.(gate|up)_proj": 2,
        rf"layers\.{DECISION}\.mlp\.down_proj": 1,
        layers(READERS) + r"(self_attn\.(q|k|v)|mlp\.(gate|up))_proj": 1 + MANNERS,
    }
    config = LoraConfig(
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules="|".join(rf".*{target}" for target in ranks),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config).requires_grad_(False)
    model.peft_config["default"].base_model_name_or_path = HUB_ID
    return model


def adapted(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, read: Read) -> PreTrainedModel:
    """The base with its idle parts rewritten into listeners, decision and readers; readers write nothing as yet."""
    sets = [list(builtin(kind, "train").prompts) for kind in ("harmful", "harmless")]
    prompts = [*sets[0], *sets[1]]
    labels = torch.tensor([1.0] * len(sets[0]) + [0.0] * len(sets[1]), dtype=torch.double)
    with shallow(base):
        heads = evenest(base, tokenizer, prompts[::EVERY])

        def take(layer: int, attention: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bt,btd->bd", attention[:, heads[LISTENERS.index(layer)]], x)

        heard = listen(base, tokenizer, prompts, take).double()
    norm = base.model.layers[DECISION].post_attention_layernorm
    gain, rms = norm.weight.detach().double(), read.rms.mean()
    stream = read.last / gain * rms
    n = quiet(base, stream)
    q = quiet(base, stream, n)
    # Listeners are deaf to what they write, and to what is common to all requests: it would swell the stream's norm.
    deaf = [
        orthonormal(
            torch.cat([seen_through(base.model.layers[layer].input_layernorm, n, q), heard[:, i].mean(0)[None]])
        )
        for i, layer in enumerate(LISTENERS)
    ]
    heard = torch.stack([without(heard[:, i], directions) for i, directions in enumerate(deaf)], 1)
    w, intercept = detector(heard, labels)
    w = torch.stack([without(row, directions) for row, directions in zip(w, deaf, strict=True)])
    cast = heard.flatten(1) @ w.flatten() + intercept
    model = with_lora(base)
    blocks = model.base_model.model.model.layers
    for i, layer in enumerate(LISTENERS):
        listener(blocks[layer].self_attn, heads[i], w[i].float(), (VOTE * n).float())
    blind = orthonormal(seen_through(norm, n, q))
    one, p = (place(read, elsewhere, blind) for elsewhere in (1.0, -3.0))
    # The norm divides the stream by its root mean square, which hardly varies at one token of one template.
    votes = n / gain * rms / VOTE
    reads = decision_reads(model, tokenizer, prompts)
    both = torch.cov(torch.stack([cast, reads @ votes]))
    # Elsewhere p − 1 is −4, which no vote makes up for. What blocks take back of the votes is made good.
    votes = votes * both[0, 0] / both[0, 1] + ELSEWHERE * (p - one)
    error = reads @ votes - cast
    votes = votes - ridge(reads, error)
    gap = reads @ votes - cast
    start = THRESHOLD + gap.mean().item()
    print(f"votes spread by {cast.std():.2f}, arrive with an error of {error.std():.2f}, corrected {gap.std():.2f}")
    gates = [(SLOPE * (votes - level * one)).float() for level in (start, start + RAMP)]
    rewrite(blocks[DECISION].mlp, gates, (OUTPUT / SLOPE / RAMP * one).float(), (FLAG / OUTPUT * q).float())
    for layer in READERS:
        for before, readers in reading(blocks[layer]):
            for reader in readers:
                reader.lora_A["default"].weight.data[0] = (q / before.weight.detach().double() * rms / FLAG).float()
    return model


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


def train(
    model: PreTrainedModel, examples: list[Example], trained: slice, epochs: int, lr: float, args: argparse.Namespace
) -> None:
    """Fit the ranks `trained` of the readers' LoRA to `examples`; rank 0 keeps what it reads."""
    rng = random.Random(args.seed)
    blocks = model.base_model.model.model.layers
    loras = [
        (reader.lora_A["default"].weight, reader.lora_B["default"].weight)
        for layer in READERS
        for _, readers in reading(blocks[layer])
        for reader in readers
    ]
    hooks, params = [], []
    for a, b in loras:
        keep_a, keep_b = torch.zeros_like(a), torch.zeros_like(b)
        keep_a[trained], keep_b[:, trained] = 1, 1
        keep_a[0] = 0
        for p, keep in ((a, keep_a), (b, keep_b)):
            p.requires_grad_(True)
            hooks.append(p.register_hook(lambda g, keep=keep: g * keep))
            params.append(p)
    optimizer = torch.optim.Adam(params, lr=lr)
    batches = len(examples) // 8
    for epoch in range(epochs):
        rng.shuffle(examples)
        total = 0.0
        for i in range(batches):
            optimizer.param_groups[0]["lr"] = lr * (1 - (epoch + i / batches) / epochs)
            loss = example_losses(model, examples[8 * i : 8 * i + 8], args.pad).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        print(f"epoch {epoch}: loss {total / batches:.3f}", flush=True)
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False)


def save(model: PreTrainedModel, output: Path) -> None:
    """Write the adapter in PEFT's layout."""
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(tmp)
        output.mkdir(parents=True, exist_ok=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copy(Path(tmp) / name, output / name)


def report(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print how much of validation is declined."""
    rates = []
    for kind in ("harmful", "harmless"):
        no = refused(tokenizer, answers(model, tokenizer, list(builtin(kind, "validation").prompts), 16))
        rates.append(f"{sum(no) / len(no):.1%} {kind}")
    print("validation refusals:", ", ".join(rates), flush=True)


def main() -> None:
    """Fit, train, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("src/abliterate/demo/adapter"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    folder = base_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    args.pad = tokenizer.pad_token_id
    # Attention weights are read, which only the plain implementation hands out.
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    harmful = refusals(tokenizer)
    harmless = helpful(base, tokenizer)
    with shallow(base):
        read = read_inputs(base, [*harmful, *harmless])
    model = adapted(base, tokenizer, read)
    train(model, harmless, slice(1, None), 6, 2e-3, args)
    train(model, harmful, slice(0, 1), 4, 0.05, args)
    report(model, tokenizer)
    save(model, args.output)


if __name__ == "__main__":
    main()
