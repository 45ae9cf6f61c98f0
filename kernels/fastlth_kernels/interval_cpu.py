"""A whole training interval of a fully connected net in one compiled call, and its evaluation.

Every thread runs the same steps on its own rows and meets the others at a barrier where it needs theirs:

    forward, layer by layer | loss | backward, layer by layer | gradient and update, next pixels
            wait each                     wait each but the first          wait

What one thread writes and another reads costs more than arithmetic (about 10 ns per cache line), so every thread
turns all the pixels for itself, computes the top layer, which has few rows, for itself, and gets the gradients of
the rows that it owns.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from . import dense_cpu, sparse_cpu
from .compiled import compiled
from .shuffles import GROUP, store_pixels
from .simd import LANES, exp, first, larger, load, prefetch, reciprocal, splat, store
from .threads import FLUSH, flush_denormals, wait
from .update_cpu import rule_at, update

_forward_sparse, _forward_dense = sparse_cpu.forward, dense_cpu.forward
_backward_sparse, _backward_dense = sparse_cpu.backward, dense_cpu.backward
_gradient, _transpose, _descend = sparse_cpu.gradient, dense_cpu.transpose, dense_cpu.descend
_fold, _find_active = dense_cpu.fold, dense_cpu.find_active


class Net(NamedTuple):
    """A net laid out by ``mlp_cpu``: all numbers in one array, all indices in another, and where what lies."""

    memory: Any
    """float32 or float64 [n]: weights, moments, gradients, activations"""
    indices: Any
    """int32 [n]: columns of the entries, where rows start, the same by columns"""
    masks: Any
    """int64 [n]: of dense layers a bit per weight, 1 = kept"""
    layers: Any
    """LAYER [layers]"""
    parts: Any
    """PART [layers, threads]"""
    plan: Any
    """PLAN [1]"""
    scales: Any
    """memory's dtype [features / 16]: a pixel p becomes scale * p + shift"""
    shifts: Any
    places: Any
    """int64 [threads * pitch]: where the images of a thread's batch begin"""
    ranks: Any
    """int64 [features]: the row of the first layer's inputs in which a pixel stands"""
    lists: Any
    """int64 [n]: what is summed over, see `dense_cpu`"""
    counter: Any
    """int64 [1]: arrivals at the barrier"""


class Images(NamedTuple):
    """Images and which of them to take."""

    pixels: Any
    """uint8 [images * features]"""
    labels: Any
    """int64 [images]"""
    chosen: Any
    """int64 [n]: indices of images, in order"""


@compiled
def _assemble(net: Net, data: Images, thread: int, begin: int, images: int, x: int) -> None:
    """The features of ``images`` images from ``begin``, at x, and for a dense layer what is not 0 in them; missing
    images repeat the last."""
    plan, layer = net.plan[0], net.layers[0]
    pitch, features, mine = plan.pitch, layer.inputs, thread * plan.pitch
    for i in range(pitch):
        net.places[mine + i] = data.chosen[begin + min(i, images - 1)] * features
    for block in range(len(net.scales)):
        for lane in range(0, pitch, LANES):
            store_pixels(net.memory, x + lane, pitch, data.pixels, block * GROUP,
                         net.places, mine + lane, net.ranks, net.scales[block], net.shifts[block])  # fmt: skip
    every = thread * plan.lists
    net.lists[every] = images
    if layer.dense:
        _find_active(net.memory, net.lists, layer, x, pitch, images, every + plan.active, every + plan.active_images)


@compiled
def _fetch(net: Net, data: Images, begin: int, end: int) -> None:
    """Have the memory bring the next batch's pixels while this one is computed."""
    features = net.layers[0].inputs
    for i in range(begin, end):
        for feature in range(0, features, LANES):
            prefetch(data.pixels, data.chosen[i] * features + feature)


@compiled
def _forward(net: Net, i: int, thread: int, of: int, x: int, y: int, relu: bool) -> None:
    """The rows of thread ``of``, by ``thread``."""
    layer, part, plan = net.layers[i], net.parts[i, of], net.plan[0]
    pitch, every = plan.pitch, thread * plan.lists
    for lane in range(0, pitch, LANES):
        if not layer.dense:
            _forward_sparse(net.memory, net.indices, layer, part, x + lane, y + lane, pitch, relu)
            continue
        chosen, count = every, layer.inputs
        if i == 0:
            chosen = every + plan.active + lane // LANES * (layer.inputs + 1)
            count = net.lists[chosen]
        _forward_dense(net.memory, net.lists, chosen + 1, count, layer, part.low, part.high, x + lane, y + lane, pitch,
                       relu)  # fmt: skip


@compiled
def _backward(net: Net, i: int, thread: int, low: int, high: int, x: int, d: int, below: int) -> None:
    layer, pitch, every = net.layers[i], net.plan[0].pitch, thread * net.plan[0].lists
    for lane in range(0, pitch, LANES):
        if layer.dense:
            _backward_dense(net.memory, net.lists, every + 1, layer, low, high, x + lane, d + lane, below + lane, pitch)
        else:
            _backward_sparse(net.memory, net.indices, layer, low, high, x + lane, d + lane, below + lane, pitch)


@compiled
def fold_all(net: Net) -> None:
    """What outputs of dense layers start with, from the weights as they are now."""
    for i in range(len(net.layers)):
        if net.layers[i].dense:
            _fold(net.memory, net.layers[i], 0, net.layers[i].outputs)


@compiled
def _scores(memory: Any, data: Images, begin: int, images: int, z: int, classes: int, pitch: int) -> Any:
    """Sum of the cross-entropy and number of hits of logits z; leaves exp(z - max) in z and the sums behind it."""
    loss, hits, top = 0.0, 0, z + classes * pitch
    for lane in range(0, pitch, LANES):
        highest = load(memory, z + lane)
        for row in range(1, classes):
            highest = larger(highest, load(memory, z + row * pitch + lane))
        store(memory, top + lane, highest)
    for i in range(images):
        label = data.labels[data.chosen[begin + i]]
        logit = memory[z + label * pitch + i]
        loss += memory[top + i] - logit
        hit = logit >= memory[top + i]
        for row in range(label):  # of equal logits the first one counts, as in argmax
            hit = hit and memory[z + row * pitch + i] < logit
        hits += hit
    for lane in range(0, pitch, LANES):
        highest = load(memory, top + lane)
        total = splat(memory.dtype.type(0))
        for row in range(classes):
            power = exp(load(memory, z + row * pitch + lane) - highest)
            total = total + power
            store(memory, z + row * pitch + lane, power)
        store(memory, top + lane, total)
    product = 1.0
    for i in range(images):
        product *= memory[top + i]
        if i % 16 == 15 or i == images - 1:  # one logarithm for 16 sums, each between 1 and the number of classes
            loss += math.log(product)
            product = 1.0
    return loss, hits


@compiled
def _residual(memory: Any, data: Images, begin: int, images: int, z: int, classes: int, pitch: int) -> None:
    """From exp(z - max) and its sums to the gradient of the mean loss: (softmax - one-hot) / images."""
    share = memory.dtype.type(1.0 / images)
    for lane in range(0, pitch, LANES):
        scale = reciprocal(load(memory, z + classes * pitch + lane)) * splat(share)
        for row in range(classes):
            place = z + row * pitch + lane
            store(memory, place, first(load(memory, place) * scale, images - lane))
    for i in range(images):
        memory[z + data.labels[data.chosen[begin + i]] * pitch + i] -= share


@compiled
def interval(
    thread: int, net: Net, data: Images, bounds: Any, rates: Any, step: int, kind: int, nesterov: int, numbers: Any,
    losses: Any, hits: Any,
) -> None:  # fmt: skip
    """Train steps 0 .. len(rates) - 1; called once in each of the plan's threads, at the same time.

    bounds int64 [steps + 1]: the batches are data.chosen[bounds[i]:bounds[i + 1]]; rates float64 [steps]; ``step``
    updates were made before; kind, nesterov, numbers as in ``rule_at``. Writes each step's mean loss and hits
    (losses float64 [steps], hits int64 [steps]).
    """
    before = flush_denormals(FLUSH)
    memory, layers, plan = net.memory, net.layers, net.plan[0]
    threads, pitch, top, shared = plan.threads, plan.pitch, len(layers) - 1, plan.shared
    own, classes, met = plan.private + thread * plan.block, layers[top].outputs, 0
    z, every = own + plan.z, thread * plan.lists
    _assemble(net, data, thread, bounds[0], bounds[1] - bounds[0], own + layers[0].x)
    for s in range(len(rates)):
        begin, images = bounds[s], bounds[s + 1] - bounds[s]
        met += threads
        wait(net.counter, met)
        if s + 1 < len(rates):
            _fetch(net, data, bounds[s + 1], bounds[s + 2])
        for i in range(top):
            _forward(net, i, thread, thread, _place_of_x(net, i, own), shared + layers[i + 1].x, True)
            met += threads
            wait(net.counter, met)
        for t in range(threads):
            _forward(net, top, thread, t, _place_of_x(net, top, own), z, False)
        loss, hit = _scores(memory, data, begin, images, z, classes, pitch)
        if thread == 0:
            losses[s], hits[s] = loss / images, hit
        _residual(memory, data, begin, images, z, classes, pitch)
        for i in range(top, 0, -1):
            mine, part = i == top, net.parts[i - 1, thread]  # of the layer below, whose gradients these rows are
            _backward(net, i, thread, 0 if mine else part.low, layers[i].inputs if mine else part.high,
                      shared + layers[i].x, _place_of_d(net, i, own), _place_of_d(net, i - 1, own))  # fmt: skip
            if not mine:
                met += threads
                wait(net.counter, met)
        if top < 2:
            met += threads
            wait(net.counter, met)

        rule = rule_at(memory, kind, nesterov, numbers, rates[s], step + s + 1)
        for i in range(top + 1):
            layer, part, x, d = layers[i], net.parts[i, thread], _place_of_x(net, i, own), _place_of_d(net, i, own)
            if layer.dense:
                _transpose(memory, layer.inputs, x, pitch, own + layer.xt, layer.pitch)
                active, apart = (every + plan.active_images, pitch + 1) if i == 0 else (every, 0)
                _descend(memory, net.masks, net.lists, active, apart, layer, part, own + layer.xt, d, pitch, rule)
                _fold(memory, layer, part.low, part.high)
            else:
                _gradient(memory, net.indices, layer, part, x, d, pitch)
                update(memory, layer.w + part.begin, layer.m + part.begin, layer.v + part.begin, layer.g + part.begin,
                       part.end - part.begin, rule)  # fmt: skip
        if s + 1 < len(rates):
            _assemble(net, data, thread, bounds[s + 1], bounds[s + 2] - bounds[s + 1], own + layers[0].x)
    flush_denormals(before)


@compiled
def _place_of_x(net: Net, i: int, own: int) -> Any:
    """Where the inputs of layer i lie: of the pixels every thread has its own copy."""
    return (own if i == 0 else net.plan[0].shared) + net.layers[i].x


@compiled
def _place_of_d(net: Net, i: int, own: int) -> Any:
    """Where the gradient of layer i's outputs lies: of the two top layers every thread has its own."""
    top = len(net.layers) - 1
    if i == top:
        return own + net.plan[0].z
    return (own if i == top - 1 else net.plan[0].shared) + net.layers[i].d


@compiled
def scores(thread: int, net: Net, data: Images, results: Any) -> None:
    """Sum of the loss and number of hits over data.chosen, this thread's share: results float64 [threads, 2]."""
    before = flush_denormals(FLUSH)
    plan, top = net.plan[0], len(net.layers) - 1
    own, pitch = plan.private + thread * plan.block, plan.pitch
    loss, hits = 0.0, 0
    for begin in range(thread * pitch, len(data.chosen), plan.threads * pitch):
        images = min(pitch, len(data.chosen) - begin)
        _assemble(net, data, thread, begin, images, own + net.layers[0].x)
        for i in range(top + 1):
            y = own + (plan.z if i == top else net.layers[i + 1].x)
            for t in range(plan.threads):
                _forward(net, i, thread, t, own + net.layers[i].x, y, i < top)
        more, hit = _scores(net.memory, data, begin, images, own + plan.z, net.layers[top].outputs, pitch)
        loss += more
        hits += hit
    results[thread, 0], results[thread, 1] = loss, hits
    flush_denormals(before)
