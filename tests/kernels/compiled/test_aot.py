"""Compiling without a GPU: the report tells a good kernel from a bad one."""

import aot


def test_a_small_kernel_and_its_report() -> None:
    aot.self_test()
