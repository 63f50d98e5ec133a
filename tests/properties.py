"""hypothesis; where it is not installed its tests are skipped, and the others of their files run."""

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:
    from unittest.mock import MagicMock

    import pytest

    st = MagicMock()

    def given(*_, **__):
        return pytest.mark.skip(reason="hypothesis is not installed")

    def settings(*_, **__):
        return lambda test: test


__all__ = ["given", "settings", "st"]
