"""What a model is worth: measurements, and reports that put models side by side.

`measure` and `speed` measure one model, `tasks` calls lm-eval, `compare` does all of it for several models, `ladder`
for the rungs of one run; `report` and `pictures` write it down. Only stages (and benchmarks) call it.
"""
