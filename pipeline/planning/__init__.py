"""What a run will need, from sizes alone: memory, traffic and time, without weights or devices.

`cards`, `models` and `job` say what is planned, `footprint` counts bytes of pruning and `distilling` those of
distillation, `costs` a step's traffic and time, `bill` what a run takes beside its steps, `planner` chooses a layout,
`report` puts it in words, `dryrun` builds the run without memory to see that it would start. Only the stages (and
benchmarks) call it.
"""
