"""The head map, drawn by hand here."""

from __future__ import annotations

from dataclasses import replace

from cli_results import model_shape

from spp_cli.render.headmap import head_map
from spp_cli.render.look import ASCII, FAINT, UNICODE
from spp_export.planning import LayerPlan

SMALL = model_shape(num_layers=3, query_heads=4, kv_heads=2)
LAYERS = (
    LayerPlan((0, 1), (0, 1, 2, 3)),
    LayerPlan((1,), (3,)),
    LayerPlan((0, 1), (1, 2)),
)


def draw(layers, shape, look, cell):
    return [line.plain.rstrip() for line in head_map(layers, shape, look, cell)]


def test_rows_are_query_heads_grouped_by_kv_group():
    assert draw(LAYERS, SMALL, UNICODE, 2) == [
        "    0",
        "  0 ██· ·",
        "  1 ██· ██",
        "    ──────",
        "  2 ██· ██",
        "  3 ████·",
    ]


def test_in_ascii():
    assert draw(LAYERS, SMALL, ASCII, 1) == [
        "    0",
        "  0 #..",
        "  1 #.#",
        "    ---",
        "  2 #.#",
        "  3 ##.",
    ]


def test_heads_of_a_removed_group_are_dimmed():
    first, second = head_map(LAYERS, SMALL, UNICODE, 1)[1:3]
    dimmed = [[span.start for span in row.spans if span.style == FAINT] for row in (first, second)]
    assert dimmed == [[5], [5]]  # layer 1 lost group 0; layer 2 lost only head 0 of it


def test_no_rules_between_heads_that_have_a_kv_head_each():
    shape = model_shape(num_layers=1, query_heads=3, kv_heads=3)
    assert draw((LayerPlan((0, 2), (0, 2)),), shape, ASCII, 1) == [
        "    0",
        "  0 #",
        "  1 .",
        "  2 #",
    ]


def test_many_heads_become_counts_per_group():
    shape = model_shape(num_layers=2, query_heads=24, kv_heads=2)
    layers = (LayerPlan((0, 1), (*range(11), *range(12, 23))), LayerPlan((1,), (13, 20)))
    assert draw(layers, shape, UNICODE, 2) == ["    0", "  0 b ·", "  1 b 2"]


def test_more_layers_than_columns_take_another_block():
    layers = (LayerPlan((0,), (0,)),) * 12
    shape = model_shape(num_layers=12, query_heads=1, kv_heads=1)
    narrow = replace(ASCII, width=14)
    assert draw(layers, shape, narrow, 1) == ["    0    5", "  0 ##########", "    10", "  0 ##"]
