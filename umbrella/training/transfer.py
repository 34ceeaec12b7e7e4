"""Batches to the device that computes, the next one while the last one is worked on."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from umbrella.data.batching import Batch


def to_device(batches: Iterable[Batch], device: torch.device | str) -> Iterator[Batch]:
    """The batches on ``device``, in their order. To a GPU, one is asked for and copied ahead, on a stream of its own.

    So one batch more than the one in use is held, on the GPU and in page-locked memory. A batch that is page-locked
    already, by the thread that made it, is taken as it is.
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    stream, source = torch.cuda.Stream(device), iter(batches)

    def fetch() -> tuple[Batch, torch.cuda.Event] | None:
        batch = next(source, None)
        if batch is None:
            return None
        with torch.cuda.stream(stream):
            return batch.pin_memory().to(device, non_blocking=True), stream.record_event()

    # A thread: to ask takes tens of milliseconds even of what is there, and a step begins with a GPU that has nothing
    # to do, since the loss of the one before was read.
    with ThreadPoolExecutor(1, thread_name_prefix="to_device") as thread:
        ahead = thread.submit(fetch)
        while fetched := ahead.result():
            ahead = thread.submit(fetch)
            yield _arrived(*fetched)


def _arrived(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """The batch, for work of the current stream: it waits for the copy, and the memory waits for it."""
    current = torch.cuda.current_stream(batch.input_ids.device)
    current.wait_event(copied)
    groups = [tensor for group in batch.pixel_values.values() for tensor in (group.voxels, group.run)]
    for tensor in (*vars(batch).values(), *groups):
        if isinstance(tensor, torch.Tensor):
            tensor.record_stream(current)
    return batch
