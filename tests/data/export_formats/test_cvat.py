"""Exports of CVAT."""

import numpy as np
import pytest
from fixtures.tool_exports import HEIGHT, WIDTH, assert_drawn, cvat, cvat_polygon, drawn, masks_of


def cvat_mask(label, left, top, patch):
    flat = patch.ravel()
    bounds = np.flatnonzero(np.diff(flat, prepend=not flat[0])).tolist() + [flat.size]
    runs = ([0] if flat[0] else []) + np.diff(bounds).tolist()
    height, width = patch.shape
    box = f'left="{left}" top="{top}" width="{width}" height="{height}"'
    return f'<mask label="{label}" rle="{", ".join(map(str, runs))}" {box}></mask>'


def test_cvat(root, load):
    patch = np.ones((10, 20), dtype=bool)
    shapes = cvat_mask("Rust_Patch", 5, 5, patch) + cvat_polygon("crack")
    (root / "a.xml").write_text(cvat(shapes + '<box label="x" xtl="1" ytl="1" xbr="9" ybr="9"/><tag label="y"/>'))
    assert_drawn(load("cvat", annotations="a.xml", images="photos")[0])
    assert load.remarks == ["skipped 1 shapes of the kind 'box' in the split 'train'"]


def test_masks_of_cvat_run_along_rows(root, load):
    patch = np.triu(np.ones((10, 20), dtype=bool))
    (root / "a.xml").write_text(cvat(cvat_mask("crack", 7, 3, patch)))
    expected = np.zeros((HEIGHT, WIDTH), dtype=bool)
    expected[3:13, 7:27] = patch
    np.testing.assert_array_equal(masks_of(load("cvat", annotations="a.xml", images="photos")[0])["crack"], expected)


def test_masks_of_cvat_may_be_a_pixel_too_large(root, load):
    """As in https://github.com/cvat-ai/cvat/issues/9316."""
    (root / "a.xml").write_text(cvat('<mask label="x" rle="0, 82" left="58" top="-1" width="2" height="41"/>'))
    mask = masks_of(load("cvat", annotations="a.xml", images="photos")[0])["x"]
    np.testing.assert_array_equal(mask, drawn((slice(None), slice(58, 60))))


def test_ellipses_turn_to_the_right(root, load):
    ellipse = '<ellipse label="crack" cx="30" cy="20" rx="15" ry="3" rotation="45"/>'
    (root / "a.xml").write_text(cvat(ellipse))
    mask = masks_of(load("cvat", annotations="a.xml", images="photos")[0])["crack"]
    assert mask[28, 38] and mask[12, 22] and not mask[12, 38] and not mask[28, 22]
    assert abs(mask.sum() - np.pi * 15 * 3) < 8


BILLION_LAUGHS = (
    '<!DOCTYPE x [<!ENTITY a "ha">'
    + "".join(f'<!ENTITY {chr(98 + i)} "{f"&{chr(97 + i)};" * 10}">' for i in range(9))
    + "]>"
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (cvat(cvat_polygon("crack"))[:-20], "expected an XML file"),
        (cvat("").replace("annotations", "html"), "expected <annotations>"),
        ('<annotations><track label="x"/></annotations>', "CVAT for images 1.1"),
        (cvat('<mask label="x" rle="1, 5" left="0" top="0" width="2" height="2"/>'), "a mask of 2 x 2 pixels"),
        (cvat('<mask label="x" rle="4" left="60" top="0" width="2" height="2"/>'), "belongs to another image"),
        (cvat('<mask label="x" rle="1" left="0" top="0" width="99999" height="99999"/>'), "expected a mask inside"),
        (cvat(cvat_polygon("crack"), 'name="a.jpg" width="99999999" height="999999"'), "expected an image size"),
        (cvat('<polygon label="&i;" points="1,1;2,2;3,3"/>', before=BILLION_LAUGHS), "expected an XML file"),
        (
            cvat(
                '<polygon label="&e;" points="1,1;9,1;9,9"/>',
                before='<!DOCTYPE x [<!ENTITY e SYSTEM "/etc/hostname">]>',
            ),
            "expected an XML file",
        ),
    ],
)
def test_bad_files_of_cvat(root, load, content, message):
    (root / "a.xml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load("cvat", annotations="a.xml", images="photos")
