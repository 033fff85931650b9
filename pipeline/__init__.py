"""NutePrune from Python: the calls of `__all__`; all else is private."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nuteprune.api import (
        distill,
        evaluate,
        export,
        finetune,
        load_masked,
        plan,
        prepare,
        prune,
        recover,
        run,
        trim,
    )

__all__ = [
    "distill", "evaluate", "export", "finetune", "load_masked", "plan", "prepare", "prune", "recover", "run", "trim",
]  # fmt: skip


def __getattr__(name: str):
    """Those calls, imported when they are first used: torch takes seconds."""
    if name in __all__:
        from nuteprune import api

        return getattr(api, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("nuteprune")
    raise AttributeError(f"module 'nuteprune' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
