"""What a failed allocation looks like. Imports no torch: the command line asks too."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU (torch's own type), or on the host (a message of its allocator)."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
