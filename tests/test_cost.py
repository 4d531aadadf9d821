"""What requests cost, and the meter of several together."""

import pytest

from tenfold.engine.request import Costs, Meter
from tenfold.server.cost import Prices, costs
from tenfold.server.usage import together

METER = Meter(prompt=Costs(tokens=100, seconds=2), decode=Costs(tokens=9, seconds=6))


def test_input_and_output_are_priced_apart() -> None:
    found = costs(METER, 200, 10, Prices(per_hour=3600))
    assert found == {
        "cost": 8,
        "cost_input": 2,
        "cost_output": 6,
        "cost_per_million_input": 2 / 200 * 1e6,
        "cost_per_million_output": 6 / 10 * 1e6,
    }


def test_electricity_is_added_and_told_without_a_price() -> None:
    assert costs(METER, 1, 1, Prices()) == {}
    assert costs(METER, 1, 1, Prices(watts=450)) == {"energy_wh": pytest.approx(1)}
    both = costs(METER, 1, 1, Prices(per_hour=3600, watts=450, per_kwh=2000))
    assert both["cost"] == pytest.approx(8 + 2)
    assert costs(METER, 1, 1, Prices(watts=450, per_kwh=2000))["cost"] == pytest.approx(2)


def test_nothing_is_divided_by_nothing() -> None:
    found = costs(Meter(), 0, 0, Prices(per_hour=1))
    assert found["cost"] == 0 and found["cost_per_million_output"] is None


def test_costs_of_several_prompts_add_up() -> None:
    other = Meter(prompt=Costs(1, 5.0, 4.0, 1, 1, 1, 0.5), distinct_experts=7, first_token_seconds=0.5)
    found = together([METER, other, Meter()])
    assert found.prompt == Costs(101, 5.0, 4.0, 1, 1, 3, 0.5) and found.decode == METER.decode
    assert found.distinct_experts == 7 and found.first_token_seconds == 0.5
