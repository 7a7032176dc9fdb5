"""Rows of drawn sources, for mixtures."""

import pytest
from fixtures.rows import dataset, image_file, mask, segmentation_row, vqa_row

from lisa_hf.data.rows import make_row


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three sources of 5, 3 and 4 rows: masks, one explained question, conversations."""
    image = image_file(tmp_path_factory.mktemp("images") / "image.png")
    explained = make_row(
        image,
        "reasons/0",
        "reasons",
        "reasoning",
        targets=[{"phrases": ["what rolls", "what is round"], "rle": mask(1)}],
        ignore=mask(2),
        explanation="It is round.",
    )
    return {
        "classes": dataset(*[segmentation_row("classes", index, image) for index in range(5)]),
        "reasons": dataset(explained, explained, explained),
        "talk": dataset(*[vqa_row("talk", index, image) for index in range(4)]),
    }
