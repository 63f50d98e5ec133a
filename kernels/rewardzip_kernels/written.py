"""Functions written out as source, for what is asked at every call: in a loop it takes longer than a row's arithmetic.

Numbers and tensors go by names, so that a source is compiled once.
"""

from collections.abc import Callable
from functools import lru_cache
from types import CodeType
from typing import Any


def function(source: str, names: dict[str, Any]) -> Callable[..., Any]:
    """The function ``f`` that the source defines, among these names."""
    exec(_compiled(source), names)
    found: Callable[..., Any] = names["f"]
    return found


@lru_cache(maxsize=1024)
def _compiled(source: str) -> CodeType:
    return compile(source, "<written>", "exec")
