"""Prices for memory: a bound for problems with a limit, and choices that come close to keeping it.

Lagrangian relaxation: every byte at point t costs `prices[t]`, and the limit is dropped. For any prices
>= 0 the bound of the priced problem, less the price of all the room there is, bounds the problem. Prices
follow a multiplicative rule (entropic mirror ascent; Beck and Teboulle, Operations Research Letters 2003;
for packing constraints Plotkin, Shmoys and Tardos 1995): where more is used than there is, averaged over
the last rounds, the price rises by a factor, elsewhere it falls. One sweep of messages goes with each step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from launcher.autopar.solver.flat import FlatProblem
from launcher.autopar.solver.messages import Messages

_FIRST_SWEEPS = 10
_STEP = 0.3  # the largest change of a price's logarithm, falling off with the number of steps
_STEP_DECAY = 0.02
_MEMORY_OF_USE = 0.8  # of the running average
_ROUND_EVERY = 10
_SETTLING_STEPS, _SETTLING_STEP, _SETTLED_LOAD = 40, 0.1, 0.97
_PATIENCE = 40  # steps without a rise of the bound worth mentioning
_WORTH_FRACTION = 1e-5


@dataclass(slots=True)
class Bound:
    """A lower bound, with the prices and the priced costs that give it, and the best choice met."""

    value: float
    prices: np.ndarray
    costs: np.ndarray
    choice: np.ndarray | None = None
    cost: float = np.inf


def ascend(
    flat: FlatProblem,
    messages: Messages,
    soon: Callable[[], bool],
    out_of_time: Callable[[], bool],
) -> Bound:
    """Raise the bound until time is soon up or it stands still; then look for choices that fit."""
    bound = Bound(-np.inf, np.zeros(len(flat.room)), flat.costs)
    for _ in range(_FIRST_SWEEPS):
        bound.value = max(bound.value, messages.sweep(flat.costs))
        if soon():
            break
    room = np.maximum(flat.room, 1e-3 * flat.room.max(initial=1.0))
    prices = np.full(len(room), 0.01 * abs(bound.value) / max(1, len(room))) / room
    load: np.ndarray | float = 1.0
    step = rose = 0
    while not soon() and step - rose < _PATIENCE and bound.value < bound.cost:
        costs = flat.with_prices(prices)
        value = messages.sweep(costs) - float(prices @ flat.room)
        if value > bound.value:
            if value > bound.value + _WORTH_FRACTION * abs(value):
                rose = step
            bound.value, bound.prices, bound.costs = value, prices, costs
        if step % _ROUND_EVERY == 0:
            remember(flat, bound, messages.rounded(costs, within_room=True))
        if len(room):
            used = flat.used(messages.rounded(costs, within_room=False))
            load = _MEMORY_OF_USE * load + (1 - _MEMORY_OF_USE) * used / room
            change = _STEP / (1 + _STEP_DECAY * step) * np.clip(load - 1, -1, 1)
            prices = prices * np.exp(change)
        step += 1
    _settle(flat, messages, bound, out_of_time)
    remember(flat, bound, messages.rounded(bound.costs, within_room=True))
    if bound.choice is None:
        remember(flat, bound, _smallest(flat))
    return bound


def _settle(
    flat: FlatProblem, messages: Messages, bound: Bound, out_of_time: Callable[[], bool]
) -> None:
    """Look for choices that fit beside the best bound: raise prices where each rounding overflows.

    The bound's own prices balance on average; roundings then overflow by a few percent.
    """
    prices = bound.prices.copy()
    room = np.maximum(flat.room, 1e-3 * flat.room.max(initial=1.0))
    for _ in range(_SETTLING_STEPS if len(prices) else 0):
        if out_of_time():
            return
        costs = flat.with_prices(prices)
        messages.sweep(costs)
        remember(flat, bound, messages.rounded(costs, within_room=True))
        load = flat.used(messages.rounded(costs, within_room=False)) / room
        prices = prices * np.exp(_SETTLING_STEP * np.clip(load / _SETTLED_LOAD - 1, -0.1, 1))


def _smallest(flat: FlatProblem) -> np.ndarray:
    """Every node with the strategy of the lowest peak: what fits if anything simple does."""
    return np.array([0 if held is None else held.max(axis=0).argmin() for held in flat.levels])


def remember(flat: FlatProblem, bound: Bound, choice: np.ndarray) -> None:
    """Keep a choice if it fits and is cheaper than what is known."""
    cost = flat.problem.cost(choice.tolist())
    if cost < bound.cost and flat.fits(flat.used(choice)):
        bound.choice, bound.cost = choice, cost
