"""`StreamOrder`: who waits for whom when weights are written, packed and read on different CUDA streams."""

from typing import Any

import torch


class StreamOrder:
    """Keeps packing after the writes it must see and after the reads of what it replaces, and reads after packing.

    On a CPU everything is in order anyway, and nothing here does anything.
    """

    def __init__(self) -> None:
        self._index: int | None = None
        self._writers: dict[Any, torch.cuda.Stream] = {}
        self._readers: dict[Any, torch.cuda.Stream] = {}
        self._packed: Any = None

    def on(self, device: torch.device) -> None:
        """Say where the weights are packed; before that nothing needs order."""
        if device.type == "cuda":
            self._index = torch.cuda.current_device() if device.index is None else device.index

    def wrote(self) -> None:
        """The current stream writes, or has just written, masters."""
        if self._index is not None:
            self._note(self._writers)

    def before_packing(self) -> None:
        """The current stream is about to read masters and to replace packed bytes."""
        if self._index is not None:
            current = torch.cuda.current_stream(self._index)
            if self._packed is not None:
                current.wait_event(self._packed)
            for stream in (*self._writers.values(), *self._readers.values()):
                if stream != current:
                    current.wait_stream(stream)
            self._writers.clear()
            self._readers.clear()

    def packed(self) -> None:
        """The current stream has packed."""
        if self._index is not None:
            self._packed = torch.cuda.current_stream(self._index).record_event()

    def reads(self) -> None:
        """The current stream is about to read packed bytes."""
        if self._packed is not None and self._note(self._readers):
            torch.cuda.current_stream(self._index).wait_event(self._packed)

    def _note(self, streams: dict[Any, torch.cuda.Stream]) -> bool:
        """Add the current stream; False if it was there."""
        assert self._index is not None
        key = torch._C._cuda_getCurrentStream(self._index)  # a tenth of what current_stream costs, many times a step
        if key in streams:
            return False
        streams[key] = torch.cuda.current_stream(self._index)
        return True
