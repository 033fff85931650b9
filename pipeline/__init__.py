"""NutePrune from Python: the calls of `__all__`; all else is private."""

__all__ = ["distill", "evaluate", "export", "finetune", "load_masked", "prune", "recover"]


def __getattr__(name: str):
    """Those calls, imported when they are first used: torch takes seconds."""
    if name in __all__:
        from nuteprune import api

        return getattr(api, name)
    raise AttributeError(f"module 'nuteprune' has no attribute '{name}'")
