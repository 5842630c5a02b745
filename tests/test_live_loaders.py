"""Whatever loaders do is found out by `begin` and done again; what cannot be repeated is refused."""

from __future__ import annotations

import pytest
import torch
from helpers_live import Bare, One, Reversed, Up, one, weight
from standin_engine import announced, checkpoint, start
from standin_layers import HIDDEN, Linear, Method

from nvfp4_qat.errors import MismatchError
from nvfp4_qat.live_model import LiveModel


def converted(param, loaded_weight):
    param.data.copy_(loaded_weight.float() * 2)


def composed(param, loaded_weight):
    param.data.copy_(loaded_weight)
    param.data.copy_(-torch.exp(param.data))


def doubled(param, loaded_weight):
    param.data.copy_(loaded_weight).mul_(2)


def turned(param, loaded_weight):
    param.data.T.copy_(loaded_weight.T)


def by_row(param, loaded_weight):
    for i in range(len(param)):
        param.data[i] = loaded_weight[len(param) - 1 - i]


def padded(param, loaded_weight):
    param.data[:, :2].copy_(loaded_weight[:, 4:])
    param.data[:, 2:].fill_(1.5)


def first_row_for_all(param, loaded_weight):
    param.data[:] = loaded_weight[:1]


def by_number(param, loaded_weight):
    param.data[torch.tensor([2, 0, 1, 3])] = loaded_weight


def by_value(param, loaded_weight):
    param.data.fill_(loaded_weight[0, 0].item())


def partly_converted(param, loaded_weight):
    param.data[:1].copy_(loaded_weight[:1])
    param.data[1:3].zero_()
    param.data[3:].copy_(loaded_weight[3:] * 2)


def cleared_before(param, loaded_weight):
    param.data.zero_()
    param.data[:, 1:].copy_(loaded_weight[:, 1:])


def by_host(param, loaded_weight):
    param.data.copy_(loaded_weight.cpu().flip(0))


def by_list(param, loaded_weight):
    param.data.copy_(torch.tensor(loaded_weight.tolist()))


def any_names(*arguments):
    param, loaded_weight = arguments
    param.data.copy_(loaded_weight * 2)


@pytest.mark.parametrize("in_rows", [False, True])
@pytest.mark.parametrize("method", [None, Method, Reversed])
@pytest.mark.parametrize(
    "loader",
    [
        *(None, converted, composed, doubled, turned, by_row, padded, first_row_for_all, by_number),
        by_value,
        partly_converted,
        cleared_before,
        any_names,
        by_host,
        by_list,
    ],
)
def test_whatever_loaders_do_is_done_again(loader, method, in_rows):
    engine = Up(one(loader, method), weight())
    for _ in range(3):
        weights = weight()
        if in_rows:
            engine.live.begin(announced(weights))
            for start, stop in ((1, 3), (0, 1), (3, 4)):
                engine.live.load_rows("one.weight", start, weights["one.weight"][start:stop])
            engine.live.commit()
        else:
            engine.update(weights)
        engine.check(weights)


ROWS = torch.tensor([2, 0, 3])


def rows_by_number(param, loaded_weight):
    param.data[ROWS] = loaded_weight[:3]


def rows_by_copy(param, loaded_weight):
    param.data.index_copy_(0, ROWS, loaded_weight[:3])


def columns_by_number(param, loaded_weight):
    param.data[:, ROWS - 6] = loaded_weight[:, :3]


def cells_by_number(param, loaded_weight):
    param.data[ROWS, ROWS + 1] = loaded_weight[0, :3]


def rows_by_mask(param, loaded_weight):
    param.data[torch.tensor([True, False, True, True])] = loaded_weight[:3]


def filled_by_number(param, loaded_weight):
    param.data.index_fill_(1, ROWS, 2.0)


@pytest.mark.parametrize(
    "loader, missing",
    [
        (rows_by_number, 6),
        (rows_by_copy, 6),
        (columns_by_number, 12),
        (cells_by_number, 21),
        (rows_by_mask, 6),
        (filled_by_number, 12),
    ],
)
def test_of_what_is_written_by_number_only_that_counts(loader, missing):
    engine = Up(one(loader), weight())
    with pytest.raises(MismatchError, match=f"one.weight: {missing} of 24 elements are missing"):
        engine.live.begin(announced(weight()))


def by_its_values(param, loaded_weight):
    param.data[loaded_weight[:, 0].argsort()] = loaded_weight


def added_by_number(param, loaded_weight):
    param.data.index_add_(0, torch.tensor([0, 1, 2, 3]), loaded_weight)


def by_its_mask(param, loaded_weight):
    param.data.masked_fill_(loaded_weight > 0, 1.0)


@pytest.mark.parametrize("loader", [by_its_values, added_by_number, by_its_mask])
def test_what_is_written_where_numbers_say_that_cannot_be_known_is_refused(loader):
    engine = Up(one(loader), weight())
    with pytest.raises(MismatchError, match="the loader of one.weight writes elements that it chooses one by one"):
        engine.live.begin(announced(weight()))


class Halved(Linear):
    """Its loader has more arguments, and converts."""

    def weight_loader(self, param, loaded_weight, shard_id=None):
        if param.dtype == torch.float32:
            loaded_weight = loaded_weight / 2
        super().weight_loader(param, loaded_weight, shard_id)


def test_calls_are_repeated_with_their_other_arguments():
    def build():
        return Bare(qkv_proj=Halved(HIDDEN, [HIDDEN] * 3), o_proj=Halved(HIDDEN, [HIDDEN]))

    def weights(seed):
        found = {name.removeprefix("layers.0."): t for name, t in checkpoint(seed).items()}
        return {
            name: t for name, t in found.items() if name.startswith(("q_", "k_", "v_", "o_")) and "bias" not in name
        }

    engine = Up(build, weights(1))
    for seed in (2, 3):
        engine.update(weights(seed))
        engine.check(weights(seed))
    assert sum(len(load.calls) for load in engine.live._recipe.loads.values()) == 4


class Factored(Bare):
    """Gives its loader an argument that this has no name for."""

    def load_weights(self, weights):
        for _, tensor in weights:
            self.one.weight.weight_loader(self.one.weight, tensor, factor=3)


def multiplied(param, loaded_weight, **options):
    param.data.copy_(loaded_weight * options["factor"])


def test_calls_are_repeated_with_arguments_that_have_no_name():
    engine = Up(lambda: Factored(one=One(multiplied)), weight())
    weights = weight()
    engine.update(weights)
    engine.check(weights)


class Outside(Bare):
    """Writes without asking the parameter's loader."""

    def load_weights(self, weights):
        for _ in weights:
            self.one.weight.data.mul_(2)


class Made(Bare):
    """Gives loaders something made from what it is given."""

    def load_weights(self, weights):
        for _, tensor in weights:
            self.one.weight.weight_loader(self.one.weight, tensor.float().exp())


@pytest.mark.parametrize(
    "build, message", [(Outside, "outside of its loader"), (Made, "made from the one that is loa")]
)
def test_what_cannot_be_repeated_is_refused_by_name(build, message):
    model = build(one=One())
    live = LiveModel(model, start(Bare(), {}), torch.device("cpu"))
    live.code.forms = start(Bare(one=model.one), weight()).forms
    live.code.forms |= {layer: {} for layer in (model,)}
    with pytest.raises(MismatchError, match=rf"one\.weight.*{message}"):
        live.begin(announced(weight()))
