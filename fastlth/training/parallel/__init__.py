"""One net trained by several processes that torchrun starts (docs/scaling.md).

team    who takes part, and sums over all of them in one order
norm    batch norm over the whole batch
lead    process 0 searches; the others make the steps it says
"""
