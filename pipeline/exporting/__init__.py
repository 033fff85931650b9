"""From a student to a small model on disk.

`folding` multiplies gates and LoRA into the weights and deletes what was removed, `small` writes the model and checks
it against the masked one (`masked`), `modeling_ragged` is the modelling file of free counts per layer, `card` and
`publish` tell the world. Evaluation and the stages call it.
"""
