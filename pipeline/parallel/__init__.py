"""Ranks, and how they share the memory of the base model.

`distributed` finds this rank's place and talks to the others; `sizes` are those of tensors and of ZeRO-3's buffers;
`zero` hands the frozen model to DeepSpeed; `shards` reads weights a layer at a time. Training and planning call it.
"""
