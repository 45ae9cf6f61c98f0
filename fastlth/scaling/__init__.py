"""Hundreds of trainings on more than one processor, GPU or machine (docs/scaling.md).

spec       a sweep's TOML file -> the jobs of ``experiments.figures``
tasks      jobs -> tasks: what one worker does without a break, and what it waits for
plan       how long, how many bytes: measured paces, then simulated
perform    one task in this process: its log, its outcome
schedule   tasks to workers, in order; lost ones again; one view of what lies under OUT
local      workers that are processes of this machine, one per GPU or group of cores
on_ray     workers that are Ray's
results    what a sweep found, one line per search and branch
"""
