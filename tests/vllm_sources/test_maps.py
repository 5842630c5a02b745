"""Where vLLM's processing puts codes is found out, and codes that are changed there are those of loading anew."""

from __future__ import annotations

import pytest
import torch
from engine import Engine
from families import some
from test_updates import update
from torch import Tensor

from nvfp4_qat.live_maps import Process, found
from nvfp4_qat.live_quick import Part

CPU = torch.device("cpu")


def repacking(part: Part) -> Process:
    (name,) = part.tape.shapes

    def process(packed: Tensor) -> list[Tensor]:
        made = part.tape.repeat({name: packed})
        assert made is not None
        return [t.contiguous() for t in made]

    return process


@pytest.mark.parametrize("family", some("qwen3", "qwen3-moe"))
def test_places_of_codes(engine: Engine) -> None:
    model = engine.model(engine.family.checkpoint(1))
    live = engine.live(model)
    for seed in (2, 3, 3):  # a number that the code looks at may be another one for other weights
        update(live, engine.family.checkpoint(seed))
    maps = 0
    for name, _ in model.named_modules():
        for parameter, part in live.quick.parts(name).items():
            if not parameter:
                continue
            (shape,) = part.tape.shapes.values()
            process = repacking(part)
            code_map = found(shape, process, CPU)
            assert code_map.tile[0] * code_map.tile[1] >= 256
            old, new = (torch.randint(256, shape, dtype=torch.uint8) for _ in range(2))
            processed = [t.clone() for t in process(old)]
            flips = torch.stack(((old ^ new) & 15, (old ^ new) >> 4), -1).flatten()
            changed = flips.nonzero()[:, 0]
            code_map.change(processed, changed, flips[changed])
            assert all(torch.equal(a, b) for a, b in zip(processed, process(new), strict=True))
            assert [(t.shape, t.dtype) for t in processed] == [(t.shape, t.dtype) for t in part.live]
            maps += 1
    assert maps >= 4
