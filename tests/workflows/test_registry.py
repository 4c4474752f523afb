"""Strategies are made by name; what is wrong with a parameter is said."""

import pytest

from agentctx.memory.errors import ConfigError
from agentctx.workflows.registry import STRATEGIES, strategy


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_is_made_without_parameters_and_from_its_own(name):
    made = strategy(name)
    assert strategy(name, **vars(made)) == made


def test_a_value_in_another_form_is_taken_as_what_it_says():
    assert strategy("search", width="3") == strategy("search", width=3)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("search", {"rounds": "two"}, "strategy search has a wrong rounds: .*not 'two'"),
        ("search", {"keep": 1.5}, "strategy search has a wrong keep: .*not 1.5"),
        ("search", {"width": None}, "strategy search has a wrong width: .*not None"),
        ("search", {"depth": 1}, "no parameter 'depth'"),
        ("definition", {}, "strategy definition has a wrong entry: Field required"),
        ("definition", {"entry": "a", "files": "b"}, "strategy definition has a wrong files: .*not 'b'"),
        ("nothing", {}, "no strategy 'nothing'"),
    ],
)
def test_what_is_wrong_is_said_with_a_remedy(name, params, message):
    with pytest.raises(ConfigError, match=message) as caught:
        strategy(name, **params)
    assert caught.value.hint
