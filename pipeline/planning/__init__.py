"""What a run will need, from sizes alone: memory, traffic and time, without weights or devices.

`footprint` counts bytes, `costs` traffic and time, `planner` chooses a layout, `dryrun` builds the run without memory
to see that it would start. Only the stages (and benchmarks) call it.
"""
