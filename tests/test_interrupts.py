"""Ctrl-C while a file is written."""

import signal
import threading

import pytest
import torch

from nvfp4_qat.interrupts import held_back
from nvfp4_qat.runlog import ArmLog, save_file


def interrupt():
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def _ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


class Interrupting:
    """Ctrl-C when it is pickled: in the middle of a file."""

    def __reduce__(self):
        interrupt()
        return int, (3,)


def test_it_waits_and_then_comes_once():
    done = []
    with pytest.raises(KeyboardInterrupt), held_back():
        interrupt()
        interrupt()
        done.append(1)
    assert done == [1]
    with held_back():
        pass


def test_it_comes_also_after_an_error():
    with pytest.raises(KeyboardInterrupt) as caught, held_back():
        interrupt()
        raise ValueError("first")
    assert isinstance(caught.value.__context__, ValueError)


def test_it_nests():
    done = []
    with pytest.raises(KeyboardInterrupt), held_back():
        with held_back():
            interrupt()
        done.append(1)
    assert done == [1]


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with held_back():
        interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_other_threads_are_left_alone():
    errors = []

    def work():
        try:
            with held_back():
                pass
        except ValueError as error:  # what signal.signal says there
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


def test_a_file_is_whole(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        save_file(tmp_path / "a.pt", {"x": torch.arange(4), "y": Interrupting()})
    found = torch.load(tmp_path / "a.pt", weights_only=False)
    assert found["y"] == 3 and found["x"].tolist() == [0, 1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_step_is_recorded_in_all_files_or_in_none(tmp_path):
    log = ArmLog(tmp_path, "qat", 0)
    with pytest.raises(KeyboardInterrupt):
        log.step({"step": 0, "reward": 1.0}, {"x": Interrupting()})
    log.close()
    assert len(log.rows) == len(ArmLog(tmp_path, "qat", 0).rows) == 1
    assert torch.load(tmp_path / "checkpoint-qat.pt", weights_only=False) == {"x": 3, "step": 1}
