"""The demo's rollout engine: a program of its own that knows nothing but the bytes it is sent.

It stands for a serving engine such as vLLM. It gets the architecture once and then, at every sync, a stream of named
tensors: bf16 ones are copied, packed ones are decompressed by the ``compressed-tensors`` library, not by this package,
so a mistake in our packing shows as a mismatch instead of cancelling out. It holds no reference to the trainer's model.

It computes in bf16 and decodes token by token with a KV cache and an attention of its own (written out, "eager"), while
the trainer runs whole sequences through a fused kernel. The two therefore round differently even with equal weights, as
two real engines do, and the KL of a bf16 run is small but not zero. Decoding with a cache alone would not do: on a CPU
the matrix products of both programs sum in the same order, and in sequences below 16 tokens 99 % of the
log-probabilities came out equal to the bit.
"""

import copy
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import MismatchError

PACKED_PARTS = ("weight_packed", "weight_scale", "weight_global_scale")


@dataclass(frozen=True)
class Loaded:
    """What it took to give an engine its weights.

    Args:
        bytes: sent.
        seconds: from the announcement to the engine's readiness, the packing included; None: not measured.
        version: of the weights, as the engine counts them; None: it does not.
    """

    bytes: int
    seconds: float | None = None
    version: int | None = None

    def figures(self) -> dict[str, float]:
        """What of it is known, by the names in a run's log."""
        known = {"sync_bytes": self.bytes, "sync_seconds": self.seconds, "sync_version": self.version}
        return {name: value for name, value in known.items() if value is not None}


@dataclass(frozen=True)
class Sample:
    """One sampled response: token ids, and the log-probability that the engine gave each of its tokens."""

    prompt: list[int]
    response: list[int]
    logprobs: list[float]


class SamplingEngine(Protocol):
    """What the training loop asks of an engine: `load`, then `generate` and `score`, `sleep`, and `load` again."""

    def load(self, stream: Iterable[tuple[str, Tensor]]) -> Loaded:
        """Replace all weights by those of a stream, and be ready to generate.

        Args:
            stream: all of a model's tensors by name in the "fused" layout, packed or not (`nvfp4_qat.rl.prepare_arm`).

        Raises:
            MismatchError: a tensor is missing, unknown, repeated or misshapen; the message lists them.
        """

    def generate(
        self, prompts: Sequence[Sequence[int]], samples: int, max_new_tokens: int, seed: int
    ) -> list[list[Sample]]:
        """Sample responses at temperature 1 from the whole vocabulary.

        Args:
            prompts: token ids, of any lengths.
            samples: responses to draw for each prompt.
            max_new_tokens: longest response; one that reaches it has no stop token.
            seed: of the random numbers.

        Returns:
            One list of ``samples`` responses for each prompt.
        """

    def score(self, samples: Sequence[Sample]) -> list[list[float]]:
        """What the engine gives responses that are there already, in one forward of whole sequences.

        Args:
            samples: prompts with responses; their own log-probabilities are not looked at.

        Returns:
            For each sample the natural-log probability of each token of its response.
        """

    def sleep(self) -> None:
        """Nothing will be asked before the next `load`: free what the trainer can use."""

    def close(self) -> None:
        """End, and free everything."""


class RolloutEngine:
    """A causal language model that samples, built from its configuration and the tensors of `load`.

    Args:
        config: the transformers configuration of the architecture.
        stop_ids: token ids that end a response; the token itself belongs to the response.
    """

    def __init__(self, config: Any, stop_ids: Iterable[int]) -> None:
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng(devices=[]):  # the random weights below are all replaced by the first `load`
            self._model: Any = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.bfloat16, attn_implementation="eager"
            ).eval()
        self._stop_ids = sorted(set(stop_ids))
        # What transformers calls the KV cache; the older name still works in newer ones, with a warning.
        taken = inspect.signature(self._model.forward).parameters
        self._cache_name = "cache" if "cache" in taken else "past_key_values"
        self._weights = dict(self._model.state_dict(keep_vars=True))
        owners: dict[int, str] = {}
        for name, tensor in self._weights.items():
            owners.setdefault(tensor.data_ptr(), name)
        self._expected = set(owners.values())
        """Every tensor once: a stream holds the tied `lm_head` under the embedding's name only."""

    @torch.no_grad()
    def load(self, stream: Iterable[tuple[str, Tensor]]) -> Loaded:
        """Replace all weights by those of a stream.

        Args:
            stream: pairs of name and tensor as `nvfp4_qat.packed_weights` yields them in the "fused" layout, or plain
                state-dict entries. ``X.weight_packed``, ``X.weight_scale``, ``X.weight_global_scale`` are one weight.

        Raises:
            MismatchError: a tensor is missing, incomplete, unknown, repeated or misshapen; the message lists all.
        """
        received, parts, arrived, wrong = 0, dict[str, dict[str, Tensor]](), set[str](), list[str]()
        for name, tensor in stream:
            received += tensor.numel() * tensor.element_size()
            stem, _, part = name.rpartition(".")
            if part in PACKED_PARTS:
                pieces = parts.setdefault(stem, {})
                if part in pieces:
                    wrong.append(f"{name}: sent twice")
                pieces[part] = tensor
                if len(pieces) < len(PACKED_PARTS):
                    continue
                # The parts of "…down_proj" are those of "…down_proj.weight", or of the fused experts' parameter itself.
                name = stem if stem in self._weights else f"{stem}.weight"
                tensor = _decompress(parts.pop(stem))
            if name in arrived:
                wrong.append(f"{name}: sent twice")
            elif name not in self._weights:
                wrong.append(f"{name}: not in this architecture")
            elif self._weights[name].shape != tensor.shape:
                wrong.append(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(self._weights[name].shape)}")
            else:
                self._weights[name].copy_(tensor)
            arrived.add(name)
        for stem, pieces in parts.items():
            wrong += [f"{stem}.{part}: missing" for part in PACKED_PARTS if part not in pieces]
        incomplete = {name for stem in parts for name in (stem, f"{stem}.weight")}
        wrong += [f"{name}: missing" for name in sorted(self._expected - arrived - incomplete)]
        if wrong:
            raise MismatchError("the rollout engine cannot use what it was sent:\n  " + "\n  ".join(wrong))
        return Loaded(received)

    def sleep(self) -> None:
        """Nothing: it takes no memory that the trainer wants."""

    def close(self) -> None:
        """Nothing: it ends with its last reference."""

    def weights(self) -> dict[str, Tensor]:
        """The weights in use, by name (not copied); to be compared, not written."""
        return {name: tensor.detach() for name, tensor in self._weights.items()}

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], samples: int, max_new_tokens: int, seed: int
    ) -> list[list[Sample]]:
        """Sample responses at temperature 1 from the whole vocabulary.

        No token is held back: a `min_new_tokens` would forbid the end of a response and so cap what can be earned.

        Args:
            prompts: token ids, of any lengths.
            samples: responses to draw for each prompt.
            max_new_tokens: longest response; one that reaches it has no stop token.
            seed: of the random numbers. Each response has its own row of them, so what one prompt draws depends neither
                on the lengths of the others nor on the batch.

        Returns:
            One list of ``samples`` responses for each prompt.
        """
        from transformers import DynamicCache

        rows = len(prompts) * samples
        generator = torch.Generator().manual_seed(seed)
        draws = torch.rand(rows, max_new_tokens, generator=generator, dtype=torch.float64)
        stops = torch.tensor(self._stop_ids)
        ids, mask = left_pad(prompts, pad=self._stop_ids[0] if self._stop_ids else 0)

        # A prompt is run once for all its samples.
        cache = DynamicCache(config=self._model.config)
        logits = self._forward(ids, mask, cache).repeat_interleave(samples, 0)
        cache.batch_repeat_interleave(samples)
        mask = mask.repeat_interleave(samples, 0)

        tokens = torch.zeros(rows, max_new_tokens, dtype=torch.long)
        logprobs = torch.zeros(rows, max_new_tokens)
        lengths = torch.full((rows,), max_new_tokens)
        running = torch.arange(rows)  # which response each row of the batch is
        for position in range(max_new_tokens):
            token, logprob = _sample(logits, draws[running, position])
            tokens[running, position], logprobs[running, position] = token, logprob
            ended = torch.isin(token, stops)
            lengths[running[ended]] = position + 1
            if ended.any():  # finished rows leave the batch
                keep = (~ended).nonzero()[:, 0]
                running, token, mask = running[keep], token[keep], mask[keep]
                if not len(running):
                    break
                cache.batch_select_indices(keep)
            if position + 1 < max_new_tokens:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                logits = self._forward(token[:, None], mask, cache)

        responses = [
            Sample(list(prompts[row // samples]), tokens[row, :length].tolist(), logprobs[row, :length].tolist())
            for row, length in enumerate(lengths.tolist())
        ]
        return [responses[start : start + samples] for start in range(0, rows, samples)]

    @torch.inference_mode()
    def score(self, samples: Sequence[Sample]) -> list[list[float]]:
        """What the engine gives responses that are there already; see `SamplingEngine`."""
        ids, mask = left_pad([sample.prompt + sample.response for sample in samples], pad=0)
        longest = max(len(sample.response) for sample in samples)
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=longest + 1,
        )
        distributions = torch.log_softmax(output.logits[:, :-1].float(), dim=-1)
        logprobs = distributions.gather(2, ids[:, -longest:, None])[..., 0]
        rows = zip(samples, logprobs, strict=True)
        return [row[longest - len(sample.response) :].tolist() for sample, row in rows]

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """Logits of the last position, in bf16 as the model computes them."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            **{self._cache_name: cache},
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def left_pad(sequences: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, both int64 ``[sequences, longest]``, padded in front."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), longest), pad)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = torch.tensor(sequence)
        mask[row, longest - len(sequence) :] = 1
    return ids, mask


def _sample(logits: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the distribution function at ``draws`` in [0, 1); returns token ids and log-probabilities."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    # In float64: the float32 sum over a large vocabulary would misplace the rare tokens at its end.
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    token = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)
    token.clamp_(max=logits.shape[-1] - 1)
    return token[:, 0], logprobs.gather(1, token)[:, 0]


def _decompress(parts: dict[str, Tensor]) -> Tensor:
    """Let compressed-tensors turn one packed weight, or a stack of experts, back into bf16."""
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    packed, scale, divisor = (parts[part] for part in PACKED_PARTS)
    if packed.ndim == 2:
        weight: Tensor = NVFP4PackedCompressor.decompress(dict(parts), scheme)["weight"]
        return weight.to(torch.bfloat16)
    experts = zip(packed, scale, divisor.view(-1, 1), strict=True)
    return torch.stack([_decompress(dict(zip(PACKED_PARTS, expert, strict=True))) for expert in experts])
