"""What the two sides compute with, under this package's contract and under others that were given up for it.

A variant says for one fusion group (bf16 weights that an engine keeps in one layer) which bytes the trainer's forward
stands for, and which bytes an engine is sent:

=====================  ======================================================  =======================================
name                   the trainer                                             the engine
=====================  ======================================================  =======================================
``contract``           this package's                                          the same bytes
``amax``               global scale amax / 2688 instead of a power of two      the same bytes
``unfused``            a global scale for each weight of a group               the same bytes; it keeps one for a layer
``unclamped``          block scales below 2^-6 as they are                     the same bytes (*)
``requantized``        this package's                                          master weights, rounded by another's code
``rounded-twice``      this package's                                          the trainer's values, rounded by it again
``repacked``           this package's                                          the trainer's values, packed again
=====================  ======================================================  =======================================

(*) Which vLLM's kernels may flush to zero or overflow, by version.

The other's code is compressed-tensors' (observed minimum and maximum, as llm-compressor uses it). ``unfused`` leaves
fused experts as they are, as gate and up are one tensor there.

On given weights a variant may come to the very bytes of the contract; `differences` counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import nvfp4_qat as nq
from nvfp4_qat.format import BLOCK, E2M1_MAX, E2M1_TIES, E4M3_MAX
from nvfp4_qat.quantizer import packed_names

Group = Sequence[Tensor]
"""The weights of one fusion group, bf16 ``[N, K]``, or one of ``[E, N, K]``."""

Packer = Callable[[Group], list[nq.PackedNVFP4]]


@dataclass(frozen=True)
class Variant:
    """One row of the table above.

    Args:
        name: its name there.
        trainer: packs a group's master weights; the trainer computes with what these bytes stand for.
        engine: packs what the engine is sent; None: the trainer's bytes.
        twice: ``engine`` is given the trainer's values and not the master weights.
    """

    name: str
    trainer: Packer
    engine: Packer | None = None
    twice: bool = False

    def sides(self, group: Group) -> tuple[list[Tensor], list[nq.PackedNVFP4], list[nq.PackedNVFP4]]:
        """The weights that the trainer computes with, bf16; the bytes they come from; those that the engine is sent."""
        packed = self.trainer(group)
        values = [p.dequantize() for p in packed]
        if self.engine is None:
            return values, packed, packed
        return values, packed, self.engine(values if self.twice else group)


def _amaxes(group: Group) -> Tensor:
    """Each weight's largest magnitude, ``[weights]`` or ``[weights, E]``."""
    return torch.stack([nq.amax(w, batch_dims=w.ndim - 2) for w in group])


def shared(policy: str) -> Packer:
    """Our packing with one global scale for the group, expert by expert."""

    def pack(group: Group) -> list[nq.PackedNVFP4]:
        g = nq.global_scale(_amaxes(group).amax(0), policy)
        return [nq.quantize(w, g) for w in group]

    return pack


def unfused(group: Group) -> list[nq.PackedNVFP4]:
    """Our packing with a global scale for each weight."""
    return [nq.quantize(w, nq.global_scale(a)) for w, a in zip(group, _amaxes(group), strict=True)]


def unclamped(group: Group) -> list[nq.PackedNVFP4]:
    """Our packing without the lower bound of block scales: they may be subnormal, and zero for a block of zeros."""
    g = nq.global_scale(_amaxes(group).amax(0))
    return [_unclamped(w, g) for w in group]


def _unclamped(w: Tensor, g: Tensor) -> nq.PackedNVFP4:
    # Reciprocals, in the contract's order: where no scale is below the bound the bytes are its own.
    blocks = w.float().unflatten(-1, (-1, BLOCK)) * (1.0 / g).view(*g.shape, *[1] * (w.ndim + 1 - g.ndim))
    scale = (blocks.abs().amax(-1) / E2M1_MAX).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    width = scale.float()[..., None]
    x = torch.where(width > 0, blocks * (1.0 / width), 0.0 * blocks).flatten(-2)
    ties = torch.tensor(E2M1_TIES, device=w.device)
    # A value on a tie goes to the even code: the lower one of the even ties, the upper one of the odd ones.
    magnitude = x.abs().clamp(max=E2M1_MAX).contiguous()
    below, above = torch.bucketize(magnitude, ties), torch.bucketize(magnitude, ties, right=True)
    code = torch.where(below % 2 == 0, below, above) | (torch.signbit(x).int() << 3)
    packed = (code[..., ::2] | (code[..., 1::2] << 4)).to(torch.uint8)
    return nq.PackedNVFP4(packed, scale, g)


def by_compressed_tensors(group: Group) -> list[nq.PackedNVFP4]:
    """compressed-tensors' own scales and codes, with one global scale for the group, expert by expert."""
    if group[0].ndim == 3:
        experts = [by_compressed_tensors([w[e].contiguous() for w in group]) for e in range(len(group[0]))]
        return [
            nq.PackedNVFP4(*(torch.stack([getattr(e[i], part) for e in experts]) for part in _PARTS))
            for i in range(len(group))
        ]
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

    scheme: QuantizationScheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    largest = _amaxes(group).amax()
    divisor = generate_gparam(-largest, largest)
    packed = []
    for w in group:
        blocks = w.unflatten(-1, (-1, BLOCK))
        scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, divisor)
        stored = NVFP4PackedCompressor.compress(
            {"weight": w, "weight_scale": scale, "weight_global_scale": divisor}, scheme
        )
        parts = stored["weight_packed"], stored["weight_scale"].to(torch.float8_e4m3fn)
        packed.append(nq.PackedNVFP4(*parts, (1.0 / divisor).reshape(())))
    return packed


_PARTS = ("packed", "scale", "global_scale")

VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("contract", shared("pow2")),
        Variant("amax", shared("amax")),
        Variant("unfused", unfused),
        Variant("unclamped", unclamped),
        Variant("requantized", shared("pow2"), by_compressed_tensors),
        Variant("rounded-twice", shared("pow2"), by_compressed_tensors, twice=True),
        Variant("repacked", shared("pow2"), shared("pow2"), twice=True),
    )
}


@dataclass(frozen=True)
class Sides:
    """A model's weights under a variant, by canonical name.

    Args:
        trainer: every weight as the trainer computes with it, bf16.
        stands: of those that are 4-bit, the bytes that the trainer's values come from.
        packed: the bytes that the engine is sent for them.
    """

    trainer: Mapping[str, Tensor]
    stands: Mapping[str, nq.PackedNVFP4]
    packed: Mapping[str, nq.PackedNVFP4]

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """What the 4-bit engine is sent, in the "fused" layout."""
        for name, tensor in self.trainer.items():
            if name not in self.packed:
                yield name, tensor
        for name, value in self.packed.items():
            g = value.global_scale.reshape(-1)
            yield from zip(packed_names(name), (value.packed, value.scale, 1.0 / g), strict=True)


def sides(masters: Mapping[str, Tensor], plan: nq.QuantPlan, variant: Variant) -> Sides:
    """Make both sides' weights.

    Args:
        masters: every tensor of the model by canonical name, bf16, tied ones once.
        plan: what is 4-bit.
        variant: how.
    """
    trainer, stands, packed = dict(masters), dict[str, nq.PackedNVFP4](), dict[str, nq.PackedNVFP4]()
    for members in plan.groups().values():
        made = variant.sides([masters[m.name] for m in members])
        for member, value, bytes_meant, bytes_sent in zip(members, *made, strict=True):
            trainer[member.name] = value
            stands[member.name] = bytes_meant
            packed[member.name] = bytes_sent
    return Sides(trainer, stands, packed)


def differences(variant: Sides, contract: Sides) -> dict[str, dict[str, int]]:
    """How much of the weights in 4 bits is not what the contract makes of the same master weights.

    Args:
        variant: what either side holds.
        contract: the same under the contract.

    Returns:
        For ``trainer`` and ``engine``: how many ``values`` differ (dequantized, bf16), bytes of ``codes``, block
        ``scales``, and global scales (``divisors``). ``of``: how many there are of each.
    """
    names = list(contract.packed)
    return {
        "trainer": _differing([(variant.stands[n], contract.stands[n]) for n in names]),
        "engine": _differing([(variant.packed[n], contract.packed[n]) for n in names]),
        "of": {
            "values": sum(contract.trainer[n].numel() for n in names),
            "codes": sum(contract.packed[n].packed.numel() for n in names),
            "scales": sum(contract.packed[n].scale.numel() for n in names),
            "divisors": sum(contract.packed[n].global_scale.numel() for n in names),
        },
    }


def _differing(pairs: Sequence[tuple[nq.PackedNVFP4, nq.PackedNVFP4]]) -> dict[str, int]:
    found = dict.fromkeys(("values", "codes", "scales", "divisors"), 0)
    for a, b in pairs:
        found["values"] += int((a.dequantize() != b.dequantize()).sum())
        found["codes"] += int((a.packed != b.packed).sum())
        found["scales"] += int((a.scale.view(torch.uint8) != b.scale.view(torch.uint8)).sum())
        found["divisors"] += int((a.global_scale.reshape(-1) != b.global_scale.reshape(-1)).sum())
    return found
