"""What the GPU checks of int4 products make of what they find."""

import math
from typing import Any

import check_w4a16
import experts_cases

RIGHT: dict[str, Any] = {
    "random_shapes": {"worst_error_in_floors": 1.01},
    "beyond_2_31_elements": {"x": 1.0, "result": 1.1},
    "repeats": {"bit_identical": True},
}
PRODUCTS: dict[str, Any] = {"worst_error_in_floors": 1.01, "models_error_in_floors": {"a": 1.0}}
LAYER = {"is_as_exact_as_the_loop": True, "bit_identical": True, "graph_replays_equal_eager": True}


def test_failures_of_products_are_seen():
    assert not check_w4a16.failures(RIGHT)
    for wrong, name in (
        ({"random_shapes": {"worst_error_in_floors": math.nan}}, "random shapes: nan floors"),
        ({"beyond_2_31_elements": {"x": 1.0, "result": 1.2}}, "result: 1.2 floors"),
        ({"repeats": {"bit_identical": False}}, "repeats"),
    ):
        assert check_w4a16.failures(RIGHT | wrong) == [name]


def test_failures_of_experts_are_seen():
    assert not experts_cases.failures(PRODUCTS, {"a": LAYER})
    for wrong, name in (
        ({"worst_error_in_floors": math.inf}, "random problems: inf floors"),
        ({"models_error_in_floors": {"b": 1.2}}, "b: 1.2 floors"),
    ):
        assert experts_cases.failures(PRODUCTS | wrong, {}) == [name]
    for flag in LAYER:
        layers = {"a": LAYER, "b": LAYER | {flag: False}}
        assert experts_cases.failures(PRODUCTS, layers) == [f"b: not {flag}"]
