"""The frozen base model with gates and LoRA around its projections, and the paired forward of teacher and student.

`layers` wraps the projections, `pairing` runs teacher and student through one decoder layer after the other, `losses`
lists the terms of the loss, `loading` reads models and tokenizers. Training, planning and export call it; it knows
neither steps nor files of a run.
"""
