"""Counts what a step would launch on a GPU: Triton kernels, and torch operations that compute or copy something."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

FREE = (
    "view", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "as_strided", "slice", "select",
    "t", "transpose", "permute", "detach", "alias", "expand", "split", "split_with_sizes", "unsqueeze", "squeeze",
    "unbind", "reshape", "is_pinned", "_local_scalar_dense", "lift_fresh", "unflatten", "resize_", "numpy_T",
)  # fmt: skip
"""Operations of torch that launch nothing."""


class Launches(TorchDispatchMode):
    """What is launched within."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in FREE and not self._within:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))

    _within = 0

    def __enter__(self) -> Launches:
        call = self._call = interpreter.GridExecutor.__call__

        def counted(executor: Any, *args: Any, **kwargs: Any) -> None:
            self.counts["kernel " + executor.fn.__name__] += 1
            self._within += 1
            try:
                call(executor, *args, **kwargs)
            finally:
                self._within -= 1

        interpreter.GridExecutor.__call__ = counted
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        interpreter.GridExecutor.__call__ = self._call
        super().__exit__(*error)
