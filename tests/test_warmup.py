"""A warm-up that is broken off: what it leaves, how it goes on, and what it does not go on from."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers_rl import TOKENIZER, micro_config, micro_model

from nvfp4_qat import warmup
from nvfp4_qat.masters import MasterAdamW
from nvfp4_qat.runlog import save_file
from nvfp4_qat.tasks import SortDigits
from nvfp4_qat.tensor_digest import digest
from nvfp4_qat.warmup import LOOK_EVERY, warm_up

STEPS = 12


class Killed(Exception):
    pass


def warmed(folder, progress=lambda step, loss: None, steps=STEPS, **overrides):
    """The weights of a warm-up, of the cache in a directory."""
    overrides = {"checkpoint_seconds": 1e9, "warmup_steps": steps, **overrides}
    cfg = micro_config(folder, warmup_batch=8, warmup_lr=5e-3, cache=folder, **overrides)
    model = micro_model()
    warm_up(model, TOKENIZER, SortDigits(2), cfg, progress)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def broken(folder, after, error=KeyboardInterrupt, **overrides):
    def progress(step, loss):
        if step == after:
            raise error

    with pytest.raises(error):
        warmed(folder, progress, **overrides)
    return list(folder.glob("*.partial"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    losses = []
    weights = warmed(tmp_path_factory.mktemp("whole"), lambda step, loss: losses.append((step, loss)))
    return weights, losses


@pytest.mark.parametrize(
    ("error", "seconds", "goes_on"),
    [(KeyboardInterrupt, 1e9, 7), (Killed, 0.0, 7), (Killed, 1e9, 0)],
    ids=["interrupted", "killed", "killed before it was saved"],
)
def test_it_goes_on_as_if_nothing_had_been(tmp_path, whole, error, seconds, goes_on):
    assert len(broken(tmp_path, 7, error, checkpoint_seconds=seconds)) == bool(goes_on)
    losses = []
    assert same(warmed(tmp_path, lambda step, loss: losses.append((step, loss))), whole[0])
    assert losses == whole[1][goes_on:]
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]


def test_it_is_made_by_one_process_while_others_wait(tmp_path, whole):
    """On a GPU two of them would end in weights that are not quite the same, and the later ones replace the first."""
    held, go_on, found = threading.Event(), threading.Event(), []

    def first(step, loss):
        if step == 1:
            held.set()
            go_on.wait(60)

    def second():
        found.append(warmed(tmp_path, lambda step, loss: found.append("trained")))

    def begun(target):
        thread = threading.Thread(target=target, daemon=True)
        thread.start()
        return thread

    one = begun(lambda: warmed(tmp_path, first))
    assert held.wait(60)
    other = begun(second)
    other.join(2)
    assert other.is_alive() and not found
    go_on.set()
    one.join(60)
    other.join(60)
    assert len(found) == 1 and same(found[0], whole[0])
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]


def test_it_may_be_broken_off_again_and_again(tmp_path, whole):
    for after in (2, 3, 9, STEPS):
        assert broken(tmp_path, after)
    assert same(warmed(tmp_path, lambda step, loss: pytest.fail("all steps had been made")), whole[0])


def test_an_interrupt_within_an_update_does_not_save_half_of_it(tmp_path, whole, monkeypatch):
    step = MasterAdamW.step
    calls = []

    def half(optimizer):
        calls.append(1)
        if len(calls) == 5:
            optimizer.masters[0].add_(1.0)
            raise KeyboardInterrupt
        step(optimizer)

    monkeypatch.setattr(MasterAdamW, "step", half)
    with pytest.raises(KeyboardInterrupt):
        warmed(tmp_path, checkpoint_seconds=0)
    monkeypatch.undo()
    seen = []
    assert same(warmed(tmp_path, lambda step, loss: seen.append(step)), whole[0])
    assert seen[0] == 5


def test_the_look_at_answers_is_not_missed(tmp_path, monkeypatch):
    """Broken off while it looks whether it is good enough, it looks again: else it would train on."""
    looks = []

    def looked(model, held_out):
        looks.append(1)
        if len(looks) == 1:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(warmup, "chance_of_right", looked)
    with pytest.raises(KeyboardInterrupt):
        warmed(tmp_path, steps=4 * LOOK_EVERY, warmup_until=0.5)
    warmed(tmp_path, lambda step, loss: pytest.fail("it was good enough"), steps=4 * LOOK_EVERY, warmup_until=0.5)
    assert len(looks) == 2


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 64
    path.write_bytes(data)


def of_another(path):
    state = torch.load(path, weights_only=True)
    save_file(path, {**state, "of": "warmup-tiny-0123456789abcdef.pt"})


def of_another_step(path):
    state = torch.load(path, weights_only=True)
    save_file(path, {**state, "step": state["step"] + 1})


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("something else"),
        lambda path: torch.save([1, 2], path),
        lambda path: flip(path, 0.5),  # in a tensor, where torch.load notices nothing
        of_another,
        of_another_step,
    ],
    ids=["torn", "empty", "text", "list", "bit", "another's", "step"],
)
def test_what_is_damaged_or_another_s_is_not_used(tmp_path, whole, damage):
    (path,) = broken(tmp_path, 7)
    damage(path)
    with pytest.warns(UserWarning, match="damaged or another warm-up's: beginning anew"):
        assert same(warmed(tmp_path), whole[0])
    assert not path.exists()


def test_other_settings_have_another_file(tmp_path, whole):
    (path,) = broken(tmp_path, 7)
    warmed(tmp_path, steps=3)
    assert path.exists()
    assert same(warmed(tmp_path), whole[0])


def test_a_leftover_of_a_finished_one_goes(tmp_path, whole):
    (path,) = broken(tmp_path, 7)
    left = path.read_bytes()
    warmed(tmp_path)
    path.write_bytes(left)
    assert same(warmed(tmp_path), whole[0]) and not path.exists()


def test_a_process_that_is_interrupted_and_one_that_is_killed(tmp_path, whole):
    """Signals at any moment, until a warm-up is finished."""
    script = f"""
import signal, sys, time
from pathlib import Path
import torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
torch.set_num_threads({torch.get_num_threads()})
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_warmup
def progress(step, loss):
    print(step, flush=True)
    time.sleep(0.2)
test_warmup.warmed(Path({str(tmp_path)!r}), progress, checkpoint_seconds=0.3)
"""
    firsts = []
    for number in (signal.SIGINT, signal.SIGKILL, None):
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        firsts.append(int(process.stdout.readline()))
        if number is not None:
            time.sleep(0.7)
            process.send_signal(number)
        assert (process.communicate()[1] == "") == (number != signal.SIGINT)
        assert (process.returncode == 0) == (number is None)
    assert firsts[0] == 1 and firsts[0] < firsts[1] <= firsts[2]
    assert same(warmed(tmp_path, lambda step, loss: pytest.fail("it is finished")), whole[0])


def test_a_digest_tells_names_dtypes_shapes_and_bytes():
    base = {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    assert digest(base) == digest({"b": base["b"].clone(), "a": base["a"].clone()})
    others = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].view(3, 2), "b": base["b"]},
        {"a": base["a"].int(), "b": base["b"]},
        {"a": base["a"], "b": base["b"] * 1.01},
        {"a": base["a"]},
    ]
    assert len({digest(tensors) for tensors in (base, *others)}) == 6
    assert digest({"a": torch.tensor(3.0)}) != digest({"a": torch.tensor([3.0])})
    assert digest({"a": torch.zeros(2, 3).t()}) == digest({"a": torch.zeros(3, 2)})
