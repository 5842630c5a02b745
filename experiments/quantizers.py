"""Quality of NVFP4 quantizers on weights that were never quantized before: plain rounding, no training.

    python experiments/quantizers.py --model DIR --out rows.jsonl                    problems and answers of a task
    python experiments/quantizers.py --model DIR --out rows.jsonl --text FILE        any text, in windows
    python experiments/quantizers.py --model DIR --out rows.jsonl --only ours modelopt

The weights that `QuantPlan` quantizes are rounded in a copy of the model, by one quantizer after the other
(`peer_quantizers`); everything else stays in bf16 and is shared with the original. Original and copy then read the same
tokens, and a row says, for one quantizer:

- ``perplexity``: exp of the mean negative log-likelihood of the scored tokens under the rounded model.
- ``kl``: KL(bf16 || rounded) per scored token, the mean over tokens. It is the sum over the whole vocabulary of
  p (log p - log q), not an estimate from samples, in float64.
- ``weight_error``: Σ (ŵ - w)² / Σ w² over all rounded weights together.
- ``bits_per_weight``: the bytes the quantizer keeps for them, its global scales included.

Scored are the tokens of a task's right answer, or all of a window but the first. The intervals (``…_95``) are the 2.5
and 97.5 percent quantiles over 10,000 draws of whole sequences with replacement. Texts differ more than quantizers do,
so two numbers compare a quantizer with another on the same sequences of the same draws, and tell apart what the
intervals of ``perplexity`` and ``kl`` do not: ``nll_increase``, nats per token over ``bf16``, and ``kl_ratio``, the KL
over that of ``ours``. Intervals are over texts alone: a model has one set of rounding errors, by which equally good
quantizers differ too, the more the smaller the model. The row ``bf16`` is measured like the others, with a copy whose
weights were not rounded: a KL above 0 there is what the device adds by not repeating itself.

Weights are always those of the model in bf16. What they are multiplied in is ``--arithmetic``: float32 shows the
quantizers alone; bf16, what engines do, adds the rounding of logits and activations to every KL but that of ``bf16``,
and takes half the memory.

A package that is not installed is skipped, with a line that says how to install it.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peer_quantizers import QUANTIZERS, Quantizer, Rounder
from torch import Tensor, nn

from nvfp4_qat import QATConfig, QuantPlan
from nvfp4_qat.errors import UserError
from nvfp4_qat.models import load_model
from nvfp4_qat.plan import canonical_name
from nvfp4_qat.runlog import load_kept
from nvfp4_qat.tasks import Task, encode_prompt, make_task

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from common import Row, append, environment  # noqa: E402

DRAWS = 10_000
CHUNK = 1 << 25
"""Elements of logits that are taken to float64 at a time."""


@dataclass(frozen=True)
class Passage:
    """Token ids to be read, of which all but the first ``given`` (one at least) are scored."""

    tokens: tuple[int, ...]
    given: int

    def __post_init__(self) -> None:
        if not 1 <= self.given < len(self.tokens):
            raise UserError(f"a passage of {len(self.tokens)} tokens, {self.given} of them given, has nothing to score")


@dataclass(frozen=True)
class Scores:
    """Sums over the scored tokens of each passage, float64 ``[passages]``, in nats; ``tokens`` counts them."""

    nll: Tensor
    kl: Tensor
    tokens: Tensor


def answers(task: Task, tokenizer: Any, count: int) -> list[Passage]:
    """Problems of a task with their right answers, of which the answers are scored. Always the same ``count``."""
    passages = []
    for problem in task.problems(count, "quantizers"):
        prompt = encode_prompt(tokenizer, problem)
        answer = tokenizer(problem.answer, add_special_tokens=False).input_ids
        passages.append(Passage((*prompt, *answer), len(prompt)))
    return passages


def windows(text: str, tokenizer: Any, length: int, count: int) -> list[Passage]:
    """The first ``count`` windows of ``length`` tokens that a text is cut into; the last may be shorter.

    Every window begins with the token that the tokenizer puts in front of a text, if it does; else its first token is
    not scored, as there is nothing to predict it from.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    begin = tokenizer.bos_token_id
    front = (begin,) if begin is not None and tokenizer("a").input_ids[0] == begin else ()
    step = length - len(front)
    cut = [(*front, *ids[start : start + step]) for start in range(0, len(ids), step)]
    return [Passage(tokens, 1) for tokens in cut[:count] if len(tokens) > 1]


def fusion_groups(model: nn.Module, plan: QuantPlan) -> Iterator[dict[str, Tensor]]:
    """The weights that share a global scale, group by group and expert by expert.

    Args:
        model: a model as loaded, before `apply_qat`.
        plan: its plan.

    Yields:
        By the last part of its layer's name in the checkpoint ("q_proj"), each weight of the group as a view ``[N, K]``
        of the model's parameter, without gradient.
    """
    parameters = {canonical_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    for members in plan.groups().values():
        groups: dict[int | None, dict[str, Tensor]] = {}
        for entry in members:
            for part in entry.checkpoint:
                view = part.of(parameters[entry.name])
                leaf = part.name.removesuffix(".weight").rpartition(".")[2]
                for index, weight in enumerate(view) if view.ndim == 3 else [(part.index, view)]:
                    group = groups.setdefault(index, {})
                    assert leaf not in group, f"two weights of a fusion group are called {leaf}"
                    group[leaf] = weight
        yield from groups.values()


def twin(model: nn.Module, plan: QuantPlan) -> nn.Module:
    """A copy of a model that shares all parameters with it but those that the plan quantizes."""
    shared = {id(p): p for name, p in model.named_parameters() if canonical_name(name) not in plan}
    return copy.deepcopy(model, dict(shared))


@torch.no_grad()
def round_weights(source: nn.Module, target: nn.Module, plan: QuantPlan, rounder: Rounder) -> Row:
    """Write the rounded weights of a model into its `twin`.

    Returns:
        ``weight_error`` and ``bits_per_weight``.

    Raises:
        ValueError: the quantizer gives something else than finite bf16 weights of the same shapes.
    """
    error = total = 0.0
    nbytes = elements = 0
    for weights, places in zip(fusion_groups(source, plan), fusion_groups(target, plan), strict=True):
        group = {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
        rounded = rounder({name: weight.clone() for name, weight in group.items()})
        for name, weight in group.items():
            value = rounded[name].weight
            if value.dtype != torch.bfloat16 or value.shape != weight.shape or not bool(value.isfinite().all()):
                raise ValueError(f"not a finite bf16 weight of shape {tuple(weight.shape)}: {name}")
            exact = weight.double()
            error += float((value.double() - exact).square().sum())
            total += float(exact.square().sum())
            nbytes, elements = nbytes + rounded[name].nbytes, elements + weight.numel()
            places[name].copy_(value)
    return {"weight_error": error / total, "bits_per_weight": 8 * nbytes / elements}


@torch.no_grad()
def score(reference: Any, model: Any, passages: Sequence[Passage], batch: int) -> Scores:
    """Read passages with two models that share a vocabulary.

    Args:
        reference: what ``p`` of the KL is from; a causal language model of transformers, on any device.
        model: what is judged, on the same device.
        passages: what to read. Those of about the same length go through together, padded at the end, where it does not
            reach the tokens before.
        batch: how many at a time.

    Returns:
        Negative log-likelihood under ``model`` and KL(reference || model), both from log-softmax in float64.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(2, len(passages), dtype=torch.float64)
    order = sorted(range(len(passages)), key=lambda i: len(passages[i].tokens))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        longest = len(passages[chosen[-1]].tokens)
        ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
        scored = torch.zeros(len(chosen), longest, dtype=torch.bool)
        for row, i in enumerate(chosen):
            ids[row, : len(passages[i].tokens)] = torch.tensor(passages[i].tokens)
            scored[row, passages[i].given : len(passages[i].tokens)] = True
        owners = torch.tensor(chosen)[scored.nonzero()[:, 0]]
        targets = ids[scored].to(device)
        predicting = scored[:, 1:].to(device)
        p = reference(input_ids=ids.to(device), use_cache=False).logits[:, :-1][predicting]
        q = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1][predicting]
        pieces = zip(*(t.split(max(1, CHUNK // p.shape[-1])) for t in (p, q, targets)), strict=True)
        per_token = torch.cat([_per_token(*piece) for piece in pieces], 1).cpu()
        sums.index_add_(1, owners, per_token)
    counts = torch.tensor([len(passage.tokens) - passage.given for passage in passages], dtype=torch.float64)
    return Scores(sums[0], sums[1], counts)


def _per_token(reference: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood and KL, float64 ``[2, tokens]``, of logits ``[tokens, vocabulary]``."""
    log_p, log_q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    p = log_p.exp()
    terms = (p * (log_p - log_q)).masked_fill_(p == 0, 0.0)  # a model may forbid tokens: 0 · (-∞ + ∞) is 0 here
    return torch.stack([-log_q.gather(1, targets[:, None])[:, 0], terms.sum(-1)])


def interval(values: Tensor, weights: Tensor, draws: int = DRAWS, seed: int = 0) -> list[float]:
    """A bootstrap interval of 95 % for Σ values / Σ weights.

    Args:
        values, weights: float64 ``[n]``, one of each for every sequence; sequences are drawn with replacement.
        draws: how often. seed: of the generator; equal seeds give equal draws for equal ``n``.

    Source: Efron 1979, the percentile interval.
    """
    generator, n = torch.Generator().manual_seed(seed), len(values)
    ratios = []
    for at in range(0, draws, step := max(1, CHUNK // n)):
        picked = torch.randint(n, (min(step, draws - at), n), generator=generator)
        ratios.append(values[picked].sum(1) / weights[picked].sum(1))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return torch.cat(ratios).quantile(ends).tolist()


def summary(scores: Scores, bf16: Scores, ours: Scores | None) -> Row:
    """Perplexity and KL, what they are beside those of ``bf16`` and ``ours``, each with its interval."""
    row: Row = {
        "perplexity": math.exp(float(scores.nll.sum() / scores.tokens.sum())),
        "perplexity_95": [math.exp(end) for end in interval(scores.nll, scores.tokens)],
        "nll_increase": float((scores.nll - bf16.nll).sum() / scores.tokens.sum()),
        "nll_increase_95": interval(scores.nll - bf16.nll, scores.tokens),
        "kl": float(scores.kl.sum() / scores.tokens.sum()),
        "kl_95": interval(scores.kl, scores.tokens),
        "kl_ratio": None,
        "kl_ratio_95": None,
    }
    if ours is not None and float(ours.kl.min()) > 0:
        ratio = float(scores.kl.sum() / ours.kl.sum())
        row |= {"kl_ratio": ratio, "kl_ratio_95": interval(scores.kl, ours.kl)}
    return row


def measure(model: Any, passages: Sequence[Passage], quantizers: Iterable[Quantizer], batch: int) -> Iterator[Row]:
    """A row for bf16, and one for every quantizer that runs here; why another does not is printed.

    Args:
        model: a causal language model whose parameters have values of bf16, in eval mode.
        passages: what to read. quantizers: in which order. batch: passages at a time.
    """
    plan = QuantPlan.from_model(model, QATConfig(enable=True))
    rounded, ours = twin(model, plan), None
    nothing: Row = {"package": None, "version": None, "global_scale": "none", "weight_error": 0.0}
    bf16 = score(model, rounded, passages, batch)
    yield {"quantizer": "bf16", **nothing, "bits_per_weight": 16.0, **summary(bf16, bf16, None)}
    for quantizer in quantizers:
        try:
            weights = round_weights(model, rounded, plan, quantizer.make())
        except ImportError as error:
            print(f"# skipped {quantizer.name}: {error}. {quantizer.installation()}", flush=True)
            continue
        except Exception as error:  # whatever it is in another package, the others go on, and the reason is printed
            if not quantizer.packages:
                raise
            print(f"# {quantizer.name} failed: {type(error).__name__}: {error}", flush=True)
            continue
        scores = score(model, rounded, passages, batch)
        if quantizer.name == "ours":
            ours = scores
        package = quantizer.packages[0] if quantizer.packages else "nvfp4-qat"
        about = {"package": package, "version": quantizer.version(), "global_scale": quantizer.global_scale}
        yield {"quantizer": quantizer.name, **about, **weights, **summary(scores, bf16, ours)}


def passages_of(arguments: argparse.Namespace, tokenizer: Any, model: Any) -> tuple[str, list[Passage]]:
    """What to read, and what rows call it.

    Raises:
        UserError: the text cannot be read or is empty, or there is no such task.
    """
    if arguments.text is None:
        task = make_task(arguments.task)
        return task.name, answers(task, tokenizer, arguments.sequences)
    try:
        text = arguments.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {arguments.text}: {error}") from None
    longest = getattr(model.config, "max_position_embeddings", None) or arguments.window
    passages = windows(text, tokenizer, min(arguments.window, longest), arguments.sequences)
    if not passages:
        raise UserError(f"{arguments.text} has no two tokens")
    return arguments.text.name, passages


def _significant(value: Any) -> Any:
    """Six significant digits of a number, or of each in a list; anything else as it is."""
    if isinstance(value, list):
        return [_significant(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; the exit code is 0 unless the arguments make no sense."""
    names = [quantizer.name for quantizer in QUANTIZERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a transformers model, or what load_model knows")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="safetensors that a run kept, into that model")
    parser.add_argument("--out", type=Path, required=True, help="file the rows are appended to")
    parser.add_argument("--text", type=Path, help="text to read (UTF-8), instead of a task")
    parser.add_argument("--task", default="sort", help="task whose answers are scored; sort by default")
    parser.add_argument("--sequences", type=int, default=256, help="problems or windows to read; 256 by default")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window of text; 512 by default")
    parser.add_argument("--batch", type=int, default=8, help="sequences at a time; 8 by default")
    parser.add_argument(
        "--arithmetic", choices=("float32", "bf16"), default="float32", help="what weights are multiplied in"
    )
    parser.add_argument("--only", choices=names, nargs="+", default=names, help="quantizers; all by default")
    arguments = parser.parse_args(argv)
    if min(arguments.sequences, arguments.batch) < 1 or arguments.window < 2:
        parser.error("--sequences and --batch are at least 1, --window at least 2")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        loaded = load_model(arguments.model)
        if arguments.weights is not None:
            load_kept(loaded.model, arguments.weights)
        model = loaded.model.to(device).requires_grad_(False)
        if arguments.arithmetic == "float32":  # the other way would also round what transformers keeps in float32
            model = model.float()
        source, passages = passages_of(arguments, loaded.tokenizer, model)
    except UserError as error:
        parser.error(str(error))
    tokens = sum(len(passage.tokens) - passage.given for passage in passages)
    what = {"model": loaded.name, "source": source, "sequences": len(passages), "tokens": tokens}
    where = {"arithmetic": arguments.arithmetic, **environment(device)}
    for row in measure(model, passages, [q for q in QUANTIZERS if q.name in arguments.only], arguments.batch):
        rounded = {key: _significant(value) for key, value in row.items()}
        append(arguments.out, [{"experiment": "quantizers", **rounded, **what, **where}])
        print(f"{row['quantizer']:28} perplexity {row['perplexity']:.4f}  KL {row['kl']:.3e}  "
              f"weight error {row['weight_error']:.3%}", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
