"""Exports of Supervisely."""

import base64
import zlib

import numpy as np
import pytest
from fixtures.tool_exports import CRACK, assert_drawn, drawn, masks_of, png, polygon_object, write_supervisely


def bitmap(values, origin):
    data = base64.b64encode(zlib.compress(png(values))).decode()
    return {"classTitle": "Rust_Patch", "geometryType": "bitmap", "bitmap": {"data": data, "origin": origin}}


@pytest.mark.parametrize("directory", ["project", "project/train"])
def test_supervisely(root, load, directory):
    box = {"classTitle": "x", "geometryType": "rectangle", "points": {"exterior": [[1, 1], [5, 5]]}}
    write_supervisely(root, [bitmap(np.ones((10, 20), bool), [5, 5]), polygon_object("crack"), box])
    assert_drawn(load("supervisely", annotations=directory)[0])
    assert load.remarks == ["skipped 1 objects of the kind 'rectangle' in the split 'train'"]


def test_holes_are_cut_out(root, load):
    write_supervisely(root, [polygon_object("crack", [[[35, 25], [50, 25], [50, 35], [35, 35]]])])
    expected = drawn(CRACK)
    expected[25:35, 35:50] = False
    np.testing.assert_array_equal(masks_of(load("supervisely", annotations="project")[0])["crack"], expected)


def test_a_packed_bomb_is_an_error(root, load):
    bomb = base64.b64encode(zlib.compress(bytes(50_000_000))).decode()
    write_supervisely(root, [bitmap(np.ones((2, 2), bool), [0, 0]) | {"bitmap": {"data": bomb, "origin": [0, 0]}}])
    with pytest.raises(ValueError, match="a.jpg.json: expected a bitmap as compressed PNG"):
        load("supervisely", annotations="project")
    write_supervisely(root, [bitmap(np.ones((2000, 2000), bool), [0, 0])])
    with pytest.raises(ValueError, match="expected a bitmap in an image of 60 x 40 pixels"):
        load("supervisely", annotations="project")
