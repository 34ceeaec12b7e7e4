"""Copy batches to the device that computes, the next one while the last one is used."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from umbrella.training.task import TaskBatch

B = TypeVar("B", bound=TaskBatch)


def to_device(batches: Iterable[B], device: torch.device | str) -> Iterator[B]:
    """Yield the batches on ``device``, in their order.

    To a GPU, one batch is copied ahead of its use, on a stream of its own. So one batch more than the one in use is
    held, on the GPU and in page-locked memory. A batch that is page-locked already is taken as it is.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield from (batch.apply(lambda tensor: tensor.to(device)) for batch in batches)
        return
    stream, source = torch.cuda.Stream(device), iter(batches)

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory().to(device, non_blocking=True)

    def fetch() -> tuple[B, torch.cuda.Event] | None:
        batch = next(source, None)
        if batch is None:
            return None
        with torch.cuda.stream(stream):
            return batch.apply(copy), stream.record_event()

    def wait_for(batch: B, copied: torch.cuda.Event) -> B:
        """Let work of the current stream wait for the copy, and the memory wait for that work."""
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)

        def record(tensor: torch.Tensor) -> torch.Tensor:
            tensor.record_stream(current)
            return tensor

        return batch.apply(record)

    # A thread: to ask takes tens of milliseconds even of what is there, and a step begins with a GPU that has nothing
    # to do, since the loss of the one before was read.
    with ThreadPoolExecutor(1, thread_name_prefix="to_device") as thread:
        ahead = thread.submit(fetch)
        while fetched := ahead.result():
            ahead = thread.submit(fetch)
            yield wait_for(*fetched)
