"""What a request cost, by the seconds that the model's steps took for it."""

from dataclasses import dataclass
from typing import Any

from tenfold.engine.request import Meter


@dataclass(frozen=True)
class Prices:
    """None is not known; money is in whatever currency the operator thinks in."""

    per_hour: float | None = None
    """Of the machine."""
    watts: float | None = None
    """That it draws."""
    per_kwh: float | None = None

    @property
    def per_second(self) -> float | None:
        """Of machine and electricity together."""
        electricity = None
        if self.watts is not None and self.per_kwh is not None:
            electricity = self.watts / 1000 * self.per_kwh
        known = [price for price in (self.per_hour, electricity) if price is not None]
        return sum(known) / 3600 if known else None


def costs(meter: Meter, prompt_tokens: int, completion_tokens: int, prices: Prices) -> dict[str, Any]:
    """Cost of the request and per million tokens, input and output apart, and the energy it took.

    The first token comes out of the prompt's last step, whose time counts as input. Tokens are those that
    `usage` tells, so cached ones make input cheaper. Empty where nothing is known.
    """
    found: dict[str, Any] = {}
    if prices.watts is not None:
        found["energy_wh"] = (meter.prompt.seconds + meter.decode.seconds) * prices.watts / 3600
    if (rate := prices.per_second) is not None:
        spent, made = meter.prompt.seconds * rate, meter.decode.seconds * rate
        found |= {"cost": spent + made, "cost_input": spent, "cost_output": made}
        found["cost_per_million_input"] = spent / prompt_tokens * 1e6 if prompt_tokens else None
        found["cost_per_million_output"] = made / completion_tokens * 1e6 if completion_tokens else None
    return found
