"""Memory and time of the loss: logits at supervised positions only, compared with the logits of every token.

    .venv/bin/python benchmarks/loss_memory.py

Forward and backward from the language model's last hidden states, with the shapes of a 0.5B model: 152,000 words, width
1,024. On a GPU the peak is what its allocator counts; elsewhere that of a process of its own for each case.
"""

import json
import resource
import subprocess
import sys
import time

import torch
from torch.nn import functional

from umbrella.models.token_nll import MAX_LOGITS, token_nll

WORDS, WIDTH, LENGTH = 152_000, 1024, 1024
SUPERVISED = 0.15
ROWS = {"cuda": 16, "cpu": 4}
CASES = ("full", "supervised", "supervised, in chunks")


def loss_of(
    case: str, hidden: torch.Tensor, words: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Σ weight·nll / Σ weight."""
    if case == "full":
        logits = functional.linear(hidden, words)[:, :-1].flatten(0, 1)
        nll = functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        return (nll * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
    at_once = MAX_LOGITS if case.endswith("chunks") else sys.maxsize
    return (token_nll(hidden, words, ids, weights, at_once) * weights).sum() / weights[:, 1:].sum()


def measure(case: str, device: str) -> dict[str, float]:
    """Peak GiB above the inputs, seconds of a second pass, the loss and the norms of two gradients."""
    rows = ROWS[device]
    torch.manual_seed(0)
    hidden = torch.randn(rows, LENGTH, WIDTH, device=device, requires_grad=True)
    words = torch.randn(WORDS, WIDTH, device=device).mul_(WIDTH**-0.5).requires_grad_()
    ids = torch.randint(WORDS, (rows, LENGTH), device=device)
    weights = (torch.rand(rows, LENGTH, device=device) < SUPERVISED).float()
    before = peak(device)
    seconds = 0.0
    for _ in range(2 if device == "cuda" else 1):
        hidden.grad = words.grad = None
        start = time.perf_counter()
        loss = loss_of(case, hidden, words, ids, weights)
        loss.backward()
        value = loss.item()
        seconds = time.perf_counter() - start
    assert hidden.grad is not None
    assert words.grad is not None
    found = {"gib": (peak(device) - before) / 2**30, "seconds": seconds, "loss": value}
    return found | {"hidden": hidden.grad.norm().item(), "words": words.grad.norm().item()}


def peak(device: str) -> int:
    """Peak memory in bytes so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure each case in a process of its own, and print."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1], device)))
        return
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}: {ROWS[device]} rows of {LENGTH}, {SUPERVISED:.0%} supervised, float32")
    first: dict[str, float] = {}
    for case in CASES:
        done = subprocess.run([sys.executable, __file__, case], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        first = first or found
        share = f"{found['gib'] / first['gib']:.2f} of full"
        same = all(abs(found[k] / first[k] - 1) < 1e-4 for k in ("loss", "hidden", "words"))
        print(
            f"{case:<22} {found['gib']:6.2f} GiB ({share}), {found['seconds']:6.2f} s, same loss and gradients: {same}"
        )


if __name__ == "__main__":
    main()
