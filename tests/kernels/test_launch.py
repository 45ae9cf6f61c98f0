"""Triton is optional: every op works as its reference where it is not installed."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
sys.modules["triton"] = None  # importing it raises ModuleNotFoundError
import torch
from fastlth_kernels import batch, bitmask, kth_magnitude, launch, masked_conv, masked_linear, masked_step
assert launch.triton is None and not launch.on_gpu(torch.empty(1))

weight, words = torch.tensor([[1.0, -2.0, 3.0]]), bitmask.pack(torch.tensor([[True, True, False]]))
assert float(kth_magnitude.kth_magnitude([weight], [words], 2)) == 2.0
kth_magnitude.prune_lowest([weight], [words], 1, [0], 1, (1, 2))
assert words.tolist() == [[2]]
group = [weight], [torch.ones(1, 3)], [], [], [], [words]
masked_step.masked_step(*group, masked_step.step_settings(0.5), None, *masked_step.step_table(*group), "sgd")
assert weight.tolist() == [[0.0, -2.5, 0.0]]
zero = torch.tensor(0)
pixels, table = torch.arange(4, dtype=torch.uint8).view(1, 2, 2, 1), torch.arange(256.0).view(1, 256)
images, labels = batch.assemble_batch(pixels, torch.tensor([7]), zero[None], table, zero, zero, (1, 2), "none",
                                      torch.float32)
assert images.flatten().tolist() == [0, 1, 2, 3] and labels.tolist() == [7]

x, w = torch.tensor([[[2.0, 3.0, 5.0]]]), torch.tensor([[[1.0, -2.0, 3.0]]], requires_grad=True)
words = bitmask.pack(torch.tensor([[[True, False, True]]]))
y = masked_linear.masked_linear(x, w, words)
y.sum().backward()
assert y.tolist() == [[[17.0]]] and w.grad.tolist() == [[[2.0, 0.0, 5.0]]]
moments, settings = [torch.zeros(1, 1, 3), torch.zeros(1, 1, 3)], masked_step.step_settings(0.5)
settings[masked_step.STEPS] += 1
masked_linear.masked_linear_adam(y.detach(), None, x, words, w.detach(), *moments, None, None, None, settings)
assert torch.allclose(w.detach(), torch.tensor([[[0.5, 0.0, 2.5]]]))  # one step moves each by the learning rate

x, w = torch.full((1, 2, 3, 3), 2.0), torch.ones(1, 2, 3, 3, requires_grad=True)
y = masked_conv.masked_conv2d(x, w, bitmask.pack(torch.arange(18).view(1, 3, 3, 2) < 5))
y.sum().backward()
assert y.tolist() == [[[[10.0]]]] and w.grad.sum() == 10.0
print("works")
"""


def test_without_triton():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.stdout == "works\n", done.stderr
