"""NutePrune from Python: `prune`, `finetune`, `export`, `evaluate` and `load_masked`; everything else is private."""

__all__ = ["evaluate", "export", "finetune", "load_masked", "prune"]


def __getattr__(name: str):
    """The five calls, imported when they are first used: torch takes seconds."""
    if name in __all__:
        from nuteprune import api

        return getattr(api, name)
    raise AttributeError(f"module 'nuteprune' has no attribute '{name}'")
