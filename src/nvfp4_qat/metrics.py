"""How far the policy that sampled is from the policy that is trained, and how much of a packed model a sync changes.

`rollout_metrics` compares two log-probabilities of the same sampled tokens: the rollout engine's, recorded while
sampling, and the trainer's, from its own forward. With ``log_ratio = train - rollout`` and ``ρ = exp(log_ratio)``:

================  =============================================================================================
``kl``            mean of -log_ratio: the plain estimator of KL(rollout ‖ train); may be negative
``k3_kl``         mean of ρ - 1 - log ρ: the same expectation, never negative, far less noise; the one to watch
``*_ppl``         mean over sequences of exp(-mean log-probability)
``chi2_token``    mean of ρ² - 1; ``chi2_seq`` the same with ρ the product over a sequence
``rollout_is_*``  the importance weights ρ, truncated at a threshold, and their effective sample size
================  =============================================================================================

Names and formulas are verl's (``verl/trainer/ppo/rollout_corr_helper.py``, 0.9.1), so that curves can be compared.
Three deliberate differences. Everything is computed in float64: for |log_ratio| below 3e-4 the rounding of
``ρ - 1 - log ρ`` in float32 exceeds its value. A sequence without a response token is left out of means over sequences
(verl counts it with perplexity 1). A log-probability that is not finite is an error (verl returns NaN or infinity).

`FlipTracker` counts the 4-bit codes, block scales and bytes that differ from the previous sync.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .errors import UserError

PREFIX = "rollout_corr/"

LOG_RATIO_BOUND = 20.0
"""verl clamps a log ratio to ±20 before it exponentiates it for weights and χ² (not for `kl` and `k3_kl`)."""

IS_LEVELS = ("token", "sequence")

CHUNK_BYTES = 1 << 24
"""Bytes compared at a time, so that counting flips needs no temporary of a tensor's size."""


def rollout_metrics(
    train_logprobs: Tensor,
    rollout_logprobs: Tensor,
    response_mask: Tensor,
    *,
    rollout_is: str | None = "token",
    rollout_is_threshold: float = 2.0,
) -> dict[str, float]:
    """Measure the mismatch between the trainer's and the rollout engine's log-probabilities of sampled tokens.

    Args:
        train_logprobs: natural-log probabilities the trainer gives the sampled tokens, ``[sequences, tokens]``.
        rollout_logprobs: the same tokens' log-probabilities when they were sampled, same shape.
        response_mask: same shape; non-zero where a token belongs to a response. Values elsewhere are ignored.
        rollout_is: importance weights per ``"token"`` or per ``"sequence"`` (the product over its tokens); None leaves
            the ``rollout_is_*`` entries out.
        rollout_is_threshold: weights are truncated to this bound; ``*_fraction_low`` counts those below its inverse.

    Returns:
        Plain floats under verl's ``rollout_corr/*`` names, and three that verl does not log: ``logprob_abs_diff``
        (mean |d|; slime's ``train_rollout_logprob_abs_diff``), ``logprob_abs_diff_max``, and ``token_mult_prob_error``
        (mean exp|d|, as in NeMo-RL). A result too large for float64 is ``inf``.

    Raises:
        UserError: shapes differ or are not 2-D, no token is selected, or a selected log-probability is not finite.
    """
    if rollout_is is not None and rollout_is not in IS_LEVELS:
        raise UserError(f"rollout_is is {rollout_is!r}; choose 'token', 'sequence' or None")
    if not rollout_is_threshold > 0:
        raise UserError(f"rollout_is_threshold must be positive, got {rollout_is_threshold}")
    shapes = {"train_logprobs": train_logprobs, "rollout_logprobs": rollout_logprobs, "response_mask": response_mask}
    if len({t.shape for t in shapes.values()}) != 1 or train_logprobs.ndim != 2:
        listing = ", ".join(f"{name} {tuple(t.shape)}" for name, t in shapes.items())
        raise UserError(f"all three tensors must have one shape [sequences, tokens], got {listing}")
    mask = response_mask.detach().to(train_logprobs.device).bool()
    if not bool(mask.any()):
        raise UserError("response_mask selects no token: there is nothing to measure")

    train = _selected("train_logprobs", train_logprobs, mask)
    rollout = _selected("rollout_logprobs", rollout_logprobs, mask)
    mask = mask[mask.any(dim=1)]
    metrics = _divergences(train, rollout, mask)
    if rollout_is is not None:
        metrics |= _importance_weights(train - rollout, mask, rollout_is, float(rollout_is_threshold))
    return {PREFIX + name: value for name, value in metrics.items()}


def _selected(name: str, logprobs: Tensor, mask: Tensor) -> Tensor:
    """The rows that have a response, in float64, zero outside the mask."""
    values = logprobs.detach().to(mask.device, torch.float64).masked_fill(~mask, 0.0)
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise UserError(
            f"{name}[{row}, {column}] is {values[row, column].item()} ({int(bad.sum())} such values under the mask); "
            "log-probabilities of sampled tokens are finite, so look for an overflow in that engine's logits"
        )
    return values[mask.any(dim=1)]


def _divergences(train: Tensor, rollout: Tensor, mask: Tensor) -> dict[str, float]:
    log_ratio = train - rollout
    distance = log_ratio.abs()
    train_mean, rollout_mean = _row_means(train, mask), _row_means(rollout, mask)
    log_ppl_diff = rollout_mean - train_mean  # log(training_ppl / rollout_ppl) of each sequence
    bounded = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    bounded_sum = log_ratio.sum(dim=1).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return {
        "kl": -_token_mean(log_ratio, mask),
        # expm1(x) - x keeps its digits where exp(x) - x - 1 has cancelled them.
        "k3_kl": _token_mean(torch.expm1(log_ratio) - log_ratio, mask),
        "logprob_abs_diff": _token_mean(distance, mask),
        "logprob_abs_diff_max": float(distance.max()),
        "token_mult_prob_error": _token_mean(distance.exp(), mask),
        "training_ppl": float(torch.exp(-train_mean).mean()),
        "training_log_ppl": float(-train_mean.mean()),
        "rollout_ppl": float(torch.exp(-rollout_mean).mean()),
        "rollout_log_ppl": float(-rollout_mean.mean()),
        "log_ppl_diff": float(log_ppl_diff.mean()),
        "log_ppl_abs_diff": float(log_ppl_diff.abs().mean()),
        "log_ppl_diff_max": float(log_ppl_diff.max()),
        "log_ppl_diff_min": float(log_ppl_diff.min()),
        "ppl_ratio": float(log_ppl_diff.exp().mean()),
        "chi2_token": _token_mean(torch.expm1(2.0 * bounded), mask),
        "chi2_seq": float(torch.expm1(2.0 * bounded_sum).mean()),
    }


def _importance_weights(log_ratio: Tensor, mask: Tensor, level: str, threshold: float) -> dict[str, float]:
    rows = log_ratio.sum(dim=1, keepdim=True)
    log_weights = log_ratio if level == "token" else rows.expand_as(log_ratio)
    raw = log_weights.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    weights = raw.clamp(max=threshold)
    mean, square = _token_mean(weights, mask), _token_mean(weights.square(), mask)
    if level == "token":
        chosen = weights[mask]
        largest, smallest = float(chosen.max()), float(chosen.min())
        high, low = _token_mean(raw > threshold, mask), _token_mean(raw < 1.0 / threshold, mask)
    else:  # extremes before truncation, and fractions of sequences instead of tokens
        largest, smallest = math.exp(min(float(rows.max()), LOG_RATIO_BOUND)), math.exp(float(rows.min()))
        log_threshold = math.log(threshold)
        high, low = _fraction(rows > log_threshold), _fraction(rows < -log_threshold)
    row_weights, raw_row_weights = _row_means(weights, mask), _row_means(raw, mask)
    return {
        "rollout_is_mean": mean,
        "rollout_is_std": math.sqrt(max(square - mean * mean, 0.0)),
        "rollout_is_max": largest,
        "rollout_is_min": smallest,
        # (Σw)² / (n Σw²): the fraction of the tokens that equally weighted ones would need for the same variance
        "rollout_is_eff_sample_size": mean * mean / square,
        "rollout_is_ratio_fraction_high": high,
        "rollout_is_ratio_fraction_low": low,
        "rollout_is_seq_mean": float(row_weights.mean()),
        "rollout_is_seq_std": float(row_weights.std()) if len(row_weights) > 1 else 0.0,
        "rollout_is_seq_max": float(row_weights.max()),
        "rollout_is_seq_min": float(row_weights.min()),
        "rollout_is_seq_max_deviation": float((row_weights - 1.0).abs().max()),
        "rollout_is_seq_fraction_high": _fraction(raw_row_weights > threshold),
        "rollout_is_seq_fraction_low": _fraction(raw_row_weights < 1.0 / threshold),
    }


def _token_mean(values: Tensor, mask: Tensor) -> float:
    return float(values[mask].double().mean())


def _row_means(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1)


def _fraction(condition: Tensor) -> float:
    return float(condition.double().mean())


@dataclass(frozen=True)
class FlipRate:
    """What changed in a packed model between two syncs, as counts.

    Attributes:
        codes_changed: 4-bit codes that differ, of ``codes``.
        scales_changed: block scales that differ, of ``scales``.
        global_scales_changed: global scales that differ, of ``global_scales``.
        bytes_changed: bytes of those three kinds of tensor that differ, of ``bytes``.
    """

    codes_changed: int
    codes: int
    scales_changed: int
    scales: int
    global_scales_changed: int
    global_scales: int
    bytes_changed: int
    bytes: int

    def fractions(self) -> dict[str, float]:
        """Changed fractions as ``flips/codes``, ``flips/scales``, ``flips/global_scales`` and ``flips/bytes``."""
        counts = asdict(self)
        return {f"flips/{kind}": counts[f"{kind}_changed"] / max(counts[kind], 1) for kind in _KINDS}


_KINDS = ("codes", "scales", "global_scales", "bytes")
_SUFFIXES = {".weight_packed": "codes", ".weight_scale": "scales", ".weight_global_scale": "global_scales"}


class FlipTracker:
    """Counts what each sync changes, while the sync's own tensor stream passes through it.

    One copy of the packed bytes is kept (4.5 bits a weight, on the tensors' own device), overwritten tensor by tensor::

        tracker = FlipTracker()
        engine.load(tracker.watch(packed_weights(model)))   # once per sync
        tracker.rate                                         # None until the second sync has passed

    The fraction of changed bytes bounds what a sync that sends only differences would have to carry.
    """

    def __init__(self) -> None:
        self.rate: FlipRate | None = None
        self._previous: dict[str, Tensor] = {}

    def watch(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass a packed (name, tensor) stream on unchanged and count differences from the last one.

        Args:
            stream: as `packed_weights` and `QATQuantizer.quantize` yield it. ``X.weight_packed`` (uint8),
                ``X.weight_scale`` (float8_e4m3fn) and ``X.weight_global_scale`` (float32) are counted.

        Yields:
            The same pairs in the same order. `rate` is renewed when the stream is exhausted.

        Raises:
            UserError: a packed tensor changed its size, appeared or disappeared since the last stream.
        """
        first = not self._previous
        seen: set[str] = set()
        changed, total = dict.fromkeys(_KINDS, 0), dict.fromkeys(_KINDS, 0)
        for name, tensor in stream:
            kind = next((kind for suffix, kind in _SUFFIXES.items() if name.endswith(suffix)), None)
            if kind is not None:
                data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                seen.add(name)
                if not first:
                    units, byte_count = self._count(name, kind, data, tensor.element_size())
                    changed[kind] += units
                    changed["bytes"] += byte_count
                total[kind] += data.numel() * 2 if kind == "codes" else tensor.numel()
                total["bytes"] += data.numel()
                self._retain(name, data)
            yield name, tensor
        if missing := sorted(self._previous.keys() - seen):
            raise UserError(f"{len(missing)} packed tensors of the last sync are missing, first {missing[0]}")
        if not first:
            self.rate = FlipRate(**{f"{k}_changed": v for k, v in changed.items()}, **total)

    def count(self, stream: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
        """Take in a stream that goes nowhere else; returns the fractions that changed, none for the first."""
        for _ in self.watch(stream):
            pass
        return {} if self.rate is None else self.rate.fractions()

    def _count(self, name: str, kind: str, data: Tensor, element_size: int) -> tuple[int, int]:
        """(changed codes or scales, changed bytes) of one tensor."""
        old = self._previous.get(name)
        if old is None or old.numel() != data.numel():
            was = "was not in" if old is None else f"had {old.numel()} bytes, not {data.numel()}, in"
            raise UserError(f"{name} {was} the last sync; use a new FlipTracker for another model")
        units = byte_count = 0
        for start in range(0, data.numel(), CHUNK_BYTES):
            difference = old[start : start + CHUNK_BYTES].to(data.device) ^ data[start : start + CHUNK_BYTES]
            byte_count += int(torch.count_nonzero(difference))
            if kind == "codes":
                units += int(torch.count_nonzero(difference & 0x0F)) + int(torch.count_nonzero(difference & 0xF0))
            else:
                units += int(difference.view(-1, element_size).any(dim=1).sum())
        return units, byte_count

    def _retain(self, name: str, data: Tensor) -> None:
        if name in self._previous:
            self._previous[name].copy_(data)
        else:
            self._previous[name] = data.clone()

    def state_dict(self) -> dict[str, Tensor]:
        """The retained bytes by tensor name (not copied), to continue counting after a restart."""
        return dict(self._previous)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the bytes of a tracker that was saved; the next stream is compared with them."""
        self._previous = {name: tensor.clone() for name, tensor in state.items()}
        self.rate = None
