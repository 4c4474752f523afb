"""The checks of the interpreter themselves: each must find the fault that is made for it."""

import interp


def test_every_check_finds_its_fault() -> None:
    interp.self_test()
