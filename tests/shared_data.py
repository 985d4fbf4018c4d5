"""Where the tests find real data and reference outputs; they skip where these are absent."""

import pathlib

import pytest

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


def shared(path: str) -> pathlib.Path:
    """Returns `../shared/PATH` seen from the project's root, or skips the test that asks."""
    full = SHARED / path
    if not full.exists():
        pytest.skip(f"needs ../shared/{path}, which is not here")
    return full
