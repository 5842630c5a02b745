"""Trainers in processes of their own, which do not come to the end of a sync."""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.request

import torch
from standin_trainer import packed, trainer

import nvfp4_qat as nq
from nvfp4_qat import rollout
from nvfp4_qat.live_http import HttpEngine


def killed(url, seed, transport, when, delay):
    """Sync, and be killed some time after a request to the engine was begun.

    Args:
        when: number of the request.
        delay: seconds; negative: before the request is made.
    """
    torch.set_num_threads(1)
    model, plan = trainer(seed)
    engines = nq.Rollout.connect(url, plan, transport=transport, bucket_bytes=3000, timeout=20)
    post, count, line = HttpEngine._post, [0], threading.Lock()

    def end():
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, path, body=None):
        with line:
            count[0] += 1
            mine = count[0]
        if mine == when and delay < 0:
            end()
        if mine == when:
            threading.Timer(delay, end).start()
        return post(self, path, body)

    HttpEngine._post = counted
    engines.sync(model)


def stalled(url, transport):
    """Send half of the weights, and then nothing any more."""
    torch.set_num_threads(1)
    model, plan = trainer(3)

    def half(*args, **options):
        for i, pair in enumerate(nq.packed_weights(*args, **options)):
            if i == 60:
                ask(url, "/generate", {"prompt": "for ever"})  # the engine is paused
            yield pair

    rollout.packed_weights = half
    nq.Rollout.connect(url, plan, transport=transport, bucket_bytes=3000, timeout=20).sync(model)


def ask(url, path, body=None):
    request = urllib.request.Request(url + path, json.dumps(body).encode() if body else b"", method="POST")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


packed(0)  # so that processes that are forked off have everything imported and compiled
