"""Fixtures of the GPU tests."""

from tests.gpu.compiled_cases import algorithms_of_their_own

__all__ = ["algorithms_of_their_own"]
