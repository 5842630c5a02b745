"""Buckets: bounded, filled while the other is read, and never waited for longer than agreed."""

from __future__ import annotations

import concurrent.futures
import threading
import time
import weakref

import pytest
import torch
from helpers_live import bits

from nvfp4_qat import live_buckets, live_memory
from nvfp4_qat.errors import MismatchError, UserError
from nvfp4_qat.live_buckets import ALIGNMENT, Direct, SharedMemory, tensors_in
from nvfp4_qat.live_memory import device_of, open_shared, share
from nvfp4_qat.live_threads import Line, background

CPU = torch.device("cpu")
SIZES = [10, 3000, 700, 1, 0, 999, 1000, 1001, 20_000, 5, 400, 600, 1, 12_000, 8]


def weights(sizes=SIZES):
    dtypes = (torch.uint8, torch.float32, torch.bfloat16, torch.float8_e4m3fn)
    return {f"w{i}": torch.randint(255, (4 * n,), dtype=torch.uint8).view(dtypes[i % 4]) for i, n in enumerate(sizes)}


class Workers:
    """Take what comes in buckets, like those of an engine."""

    def __init__(self):
        self.got, self.updates, self.calls = {}, set(), 0

    def __call__(self, method, update, *args):
        self.calls += 1
        self.updates.add(update)
        if method == "nvfp4_load":
            self.got.update((name, t.clone()) for name, t in args[0])
            return
        assert method == "nvfp4_load_shared"
        ((device, shared),), places = args
        assert device == "cpu"
        for name, tensor in tensors_in(open_shared(shared, CPU), places):
            assert name not in self.got
            self.got[name] = tensor.clone()


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[n].shape == b[n].shape and a[n].dtype == b[n].dtype and bits(a[n]) == bits(b[n]) for n in a
    )


@pytest.fixture
def held(monkeypatch):
    """Bytes of buckets that there are now, and the most that there were."""
    now, most, allocate = [0], [0], live_buckets.allocate

    def counted(nbytes, device):
        buffer = allocate(nbytes, device)
        now[0] += nbytes
        most[0] = max(most[0], now[0])
        weakref.finalize(buffer, lambda: now.__setitem__(0, now[0] - nbytes))
        return buffer

    monkeypatch.setattr(live_buckets, "allocate", counted)
    return now, most


@pytest.mark.parametrize("limit", [1, 600, 4000, 1 << 20])
@pytest.mark.parametrize("kind", [Direct, SharedMemory])
def test_all_tensors_arrive_whatever_the_size_of_buckets(kind, limit):
    workers, sent = Workers(), weights()
    sender = kind(workers, "u", limit) if kind is Direct else kind(workers, "u", ["cpu"], limit)
    for name, tensor in sent.items():
        sender.send(name, tensor)
        if kind is SharedMemory:
            tensor_before, sent[name] = sent[name], tensor.clone()
            tensor_before.view(torch.uint8).fill_(7)  # its memory may change
    sender.flush()
    assert equal(workers.got, sent) and workers.updates == {"u"}
    assert (workers.calls == 1) == (limit == 1 << 20)
    sender.close()


@pytest.mark.parametrize("limit", [600, 4000, 30_000])
def test_no_more_than_two_buckets_are_held(limit, held):
    now, most = held
    workers, sent = Workers(), weights([2000] * 40 + [20_000, 3, 18_000, 500])
    sender = SharedMemory(workers, "u", ["cpu"], limit)
    for name, tensor in sent.items():
        sender.send(name, tensor)
        largest = max(t.nbytes for t in list(sent.values())[: list(sent).index(name) + 1])
        assert most[0] <= 2 * max(limit, largest)
    sender.flush()
    assert most[0] == 80_000 + max(limit, 8000), "one bucket grew, for the largest tensor"
    assert equal(workers.got, sent)
    sender.close()
    assert now[0] == 0


def test_a_process_hands_over_no_more_than_a_bucket_at_once():
    handed = []
    sender = Direct(lambda _, __, pairs: handed.append(sum(t.nbytes for _, t in pairs)), "u", 4000)
    for name, tensor in weights([500, 500, 1, 900, 2000, 3, 10]).items():
        sender.send(name, tensor)
    sender.flush()
    assert handed == [4000, 3604, 8000, 52]


def test_one_bucket_is_filled_while_the_other_is_read_and_not_before_it_was():
    reading, go_on, got = threading.Semaphore(0), threading.Semaphore(0), []

    def workers(_, __, ___, places):
        reading.release()
        assert go_on.acquire(timeout=10)
        got.append([name for name, *_ in places])

    sender = SharedMemory(workers, "u", ["cpu"], 1024, timeout=10)
    tensors = weights([256] * 4)
    for name in ("w0", "w1", "w2"):  # w0 is being read, w1 waits for that, w2 has no room
        filler = background(sender.send, name, tensors[name])
        if name != "w2":
            filler.result(5)
    assert reading.acquire(timeout=5)
    time.sleep(0.1)
    assert not filler.done() and got == []
    go_on.release()
    filler.result(5)
    assert got == [["w0"]]
    go_on.release(2)
    sender.flush()
    assert got == [["w0"], ["w1"], ["w2"]]
    sender.close()


def test_an_error_of_the_workers_comes_back_to_the_sender():
    def workers(*_):
        raise MismatchError("does not fit")

    sender = SharedMemory(workers, "u", ["cpu"], 100)
    with pytest.raises(MismatchError, match="does not fit"):
        for name, tensor in weights().items():
            sender.send(name, tensor)
    sender.close()


@pytest.mark.parametrize("error", [TimeoutError("the workers' own"), None])
def test_workers_that_do_not_answer_are_waited_for_as_long_as_agreed(error):
    stop = threading.Event()

    def workers(*_):
        if error is not None:
            raise error
        stop.wait(10)

    sender = SharedMemory(workers, "u", ["cpu"], timeout=0.2)
    sender.send("w", torch.ones(4))
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="own" if error else "did not take a bucket within 0.2 s"):
        sender.flush()
    sender.close()
    assert time.monotonic() - start < 2
    stop.set()


def test_closing_does_not_wait_for_calls_that_will_not_be_made():
    began, go = threading.Event(), threading.Event()
    sender = SharedMemory(lambda *_: began.set() or go.wait(10), "u", ["cpu"], 16, timeout=5)
    sender.send("w0", torch.ones(4))
    sender.send("w1", torch.ones(4))  # passes w0 on
    sender._finish()  # and w1, which waits behind it
    assert began.wait(5)
    closing = background(sender.close)
    time.sleep(0.1)
    assert not closing.done(), "workers still read w0"
    go.set()
    closing.result(2)


@pytest.mark.parametrize("at, shape", [(8, [1]), (-256, [1]), (256, [65]), (512, [1])])
def test_places_that_are_not_in_the_bucket_are_refused(at, shape):
    bucket = torch.zeros(512, dtype=torch.uint8)
    assert [n for n, _ in tensors_in(bucket, [["w", 256, [64], "float32"]])] == ["w"]
    with pytest.raises(UserError, match=f"w, .* cannot lie at byte {at} of a bucket of 512"):
        list(tensors_in(bucket, [["w", at, shape, "float32"]]))


def test_tensors_in_buckets_begin_at_multiples_that_kernels_like():
    places = []
    sender = SharedMemory(lambda *args: places.extend(args[-1]), "u", ["cpu"])
    for name, tensor in weights().items():
        sender.send(name, tensor)
    sender.flush()
    sender.close()
    assert len(places) == len(SIZES) and all(at % ALIGNMENT == 0 for _, at, *_ in places)


def test_a_device_that_is_not_here_is_an_error():
    with pytest.raises(UserError, match='GPU-1 is not visible .*CUDA_VISIBLE_DEVICES.*transport="broadcast"'):
        device_of("GPU-1")
    assert device_of("cpu") == CPU
    with pytest.raises(UserError, match="'cuda' cannot be opened on cpu"):
        open_shared({"kind": "cuda"}, CPU)


def test_descriptions_of_a_buffer_are_json_and_open_the_same_memory():
    import json

    buffer = live_memory.allocate(1000, CPU)
    shared = json.loads(json.dumps(share(buffer)))
    buffer.fill_(3)
    opened = open_shared(shared, CPU)
    assert opened.numel() == 1000 and bool((opened == 3).all())
    opened[5] = 9
    assert buffer[5] == 9


def test_calls_in_line_are_made_in_order_and_none_after_closing():
    line, seen, began, go = Line(), [], threading.Event(), threading.Event()
    first = line.put(lambda: began.set() or go.wait(10))
    assert began.wait(5)
    rest = [line.put(seen.append, i) for i in range(3)]
    line.close()
    go.set()
    assert first.result(5) and all(answer.cancelled() for answer in rest)
    assert not concurrent.futures.wait(rest, 5).not_done
    line = Line()
    for i in range(50):
        last = line.put(seen.append, i)
    last.result(5)
    assert seen == list(range(50))
    line.close()
