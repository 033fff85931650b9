"""The triton kernels run under the interpreter here; it must be chosen before `kernels.triton_kernels` is imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
