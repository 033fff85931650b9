"""From a student to a small model on disk.

`folding` multiplies gates and LoRA into the weights and deletes what was removed, `small` checks the model against the
masked one (`masked`) and writes it in the forms that `targets` lists, `modeling_ragged` is the modelling file of free
counts per layer, `card` and `publish` tell the world. Evaluation and the stages call it.
"""
