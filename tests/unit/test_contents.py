"""Sentences of the report that only some machines get."""

from nuteprune.evaluation.contents import conditions


def test_a_gpus_decode_ratio_is_read_with_its_launches_in_mind():
    measured = {"prompt_tokens": 8, "new_tokens": 8, "repeats": 3, "device": "cuda", "threads": 1}
    report = {
        "models": [{"perplexity": {}, "first_tokens": [], "speed": {"1": measured}}], "protocol": "own", "ratio": {},
        "held_out": True, "same_tokens": True, "dtype": "bfloat16", "environment": {"gpu": "NVIDIA H100"},
    }  # fmt: skip
    told = "bound by kernel launches"
    assert told in conditions(report)[-1]
    assert told not in conditions(report | {"environment": {"gpu": None}})[-1]
