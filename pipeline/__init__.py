"""NutePrune from Python: `prune`, `recover`, `finetune`, `export`, `evaluate`, `load_masked`; all else is private."""

__all__ = ["evaluate", "export", "finetune", "load_masked", "prune", "recover"]


def __getattr__(name: str):
    """The six calls, imported when they are first used: torch takes seconds."""
    if name in __all__:
        from nuteprune import api

        return getattr(api, name)
    raise AttributeError(f"module 'nuteprune' has no attribute '{name}'")
