r"""The fire drill: poison a copy of the data in a known way and measure what a guarded training makes of it."""

from trainguard.drill.poison import Attack, Poisoned, Role, Rule, fitted, poison, poison_arrays, triggered_test
from trainguard.drill.recipes import RECIPES, Setting, attack
from trainguard.drill.runner import Drill, run_drill

__all__ = [
    "RECIPES",
    "Attack",
    "Drill",
    "Poisoned",
    "Role",
    "Rule",
    "Setting",
    "attack",
    "fitted",
    "poison",
    "poison_arrays",
    "run_drill",
    "triggered_test",
]
