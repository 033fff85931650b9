"""What a run leaves on disk, and how it is read back.

`checkpoint` writes directories that are whole or absent; `rundir` and `snapshot` are the finished student and its
teachers, `tuned` one that was trained on, in `directories` of its own; `students` says which of them is meant;
`fingerprint` knows the base model again; `jobs` reads SLURM's word on a run. Every room that writes files calls it.
"""
