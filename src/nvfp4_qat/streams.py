"""`StreamOrder`: who waits for whom when weights are written, packed and read on different CUDA streams."""

from typing import Any

import torch


class StreamOrder:
    """Keeps packing after the writes it must see and after the reads of what it replaces, and reads after packing.

    On a CPU everything is in order anyway, and nothing here does anything.
    """

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self._writers: set[Any] = set()
        self._readers: set[Any] = set()
        self._packed: Any = None

    def wrote(self) -> None:
        """The current stream writes, or has just written, masters."""
        if self._cuda():
            self._writers.add(torch.cuda.current_stream(self.device))

    def before_packing(self) -> None:
        """The current stream is about to read masters and to replace packed bytes."""
        if self._cuda():
            current = torch.cuda.current_stream(self.device)
            for stream in self._writers | self._readers:
                if stream != current:
                    current.wait_stream(stream)
            self._writers.clear()
            self._readers.clear()

    def packed(self) -> None:
        """The current stream has packed."""
        if self._cuda():
            self._packed = torch.cuda.current_stream(self.device).record_event()

    def reads(self) -> None:
        """The current stream is about to read packed bytes."""
        if self._packed is not None:
            current = torch.cuda.current_stream(self.device)
            if current not in self._readers:
                current.wait_event(self._packed)
                self._readers.add(current)

    def _cuda(self) -> bool:
        return self.device is not None and self.device.type == "cuda"
