"""Steps: from blocks and a model to a student and its teachers.

`loop` is the same for every stage that trains: resume, micro-batches, bad steps, checkpoints, signals. `engine` holds
the optimizers, `teachers` the bank of snapshots, `importance` the start of the gates; `resume` writes and reads their
state, `lifecycle` owns the run's directory, `tracking` tells what is going on. Only stages (and benchmarks) call it.
"""
