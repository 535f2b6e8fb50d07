"""Matrices as text."""

import re

import numpy as np
import pytest

from moemerge.report.heat import Form, average_blocks, by_slot, draw, strip

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def test_by_slot_puts_siblings_beside_each_other():
    assert by_slot(3, 2) == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize(("size", "most"), [(8, 8), (9, 4), (7, 3), (512, 80)])
def test_blocks_keep_the_mean_of_what_they_cover(size, most):
    matrix = np.random.default_rng(0).uniform(size=(size, size))
    averaged, factor = average_blocks(matrix, most)
    assert len(averaged) <= most
    assert factor == -(-size // most)
    assert averaged[0, 0] == pytest.approx(matrix[:factor, :factor].mean())
    rest = factor * (len(averaged) - 1)
    assert averaged[-1, 0] == pytest.approx(matrix[rest:, :factor].mean())


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize("width", [10, 24, 80])
def test_lines_fit_the_screen(form, width):
    lines, factor = draw(np.ones((24, 24)), form, width, 1.0)
    plain = [ESCAPE.sub("", line) for line in lines]
    assert max(map(len, plain)) <= width
    cells = -(-24 // factor)
    assert len(lines) == (-(-cells // 2) if form is Form.COLOUR else cells)


def test_zero_is_darkest_and_most_is_brightest():
    matrix = np.array([[0.0, 1.0], [1.0, 0.0]])
    assert draw(matrix, Form.ASCII, 80, 1.0)[0] == ["  @@", "@@"]
    assert draw(matrix, Form.SHADES, 80, 1.0)[0] == ["  ██", "██"]
    coloured = draw(matrix, Form.COLOUR, 80, 1.0)[0][0]
    assert coloured.startswith("\x1b[38;2;68;1;84m\x1b[48;2;253;231;37m▀")


def test_values_beyond_the_top_are_as_bright_as_it():
    matrix = np.array([[0.0, 7.0], [7.0, 0.5]])
    assert draw(matrix, Form.ASCII, 80, 1.0)[0] == ["  @@", "@@++"]


def test_equal_experts_alone_are_drawn():
    assert draw(np.zeros((2, 2)), Form.ASCII, 80, 0.0)[0] == ["", ""]


def test_strip_has_a_character_a_layer_and_gaps_where_nothing_is_known():
    assert strip([0.0, None, 1.0], Form.ASCII, 80) == ("0 9", 1)
    assert strip([0.0, 1.0, 1.0, 1.0], Form.ASCII, 2) == ("59", 2)
