"""Steps: from blocks and a model to a student and its teachers.

`loop` is the same for every stage that trains: resume, steps, checkpoints, signals. A stage is a `trainer`, which knows
micro-batches and bad steps, and `fixed` is one whose gates stay. `engine` holds the optimizers, `teachers` says who
teaches, `importance` the start of the gates; `resume` writes and reads their state, `tracking` tells what is going on.
Only stages (and benchmarks) call it.
"""
