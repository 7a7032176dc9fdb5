"""Randomly damaged annotation files: a clear error or a valid row, never a crash, a hang or a stray mask."""

import base64
import copy
import io
import json
import pickle
import random
import shutil
import time
import zlib

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
from fixtures.paths import TREE

from data_scripts import make_builder
from lisa_hf.data.images import load_row_image
from lisa_hf.data.masks import Mask, encode_mask


HEIGHT, WIDTH = 40, 60
POLYGON = [[5, 5], [25, 5], [25, 15], [5, 15]]
FLAT = [value for point in POLYGON for value in point]
MAX_SECONDS = 20  # per file
HOSTILE = [
    *(None, True, -1, 0, 0.5, 7, 255, 1e8, 1e20, -1e308, 1e308, 2**31, 2**63, 10**30, float("nan"), float("inf")),
    *(
        "",
        "x",
        "../../secret.png",
        "/etc/hostname",
        "http://127.0.0.1:9/a.png",
        "C:\\a.png",
        "\ud800",
        "\0",
        "é" * 1000,
    ),
    *([], {}, [[]], [{}], [None], [1, 2], [[1, 2], [3, 4]], [0] * 1000, {"size": [1, 1], "counts": "1"}),
]


def deep(depth):
    return "[" * depth + "]" * depth


def places(value, path=()):
    """Yield the path of every value in a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def damage_json(content, rng):
    """Replace, remove or double a few values anywhere in a JSON value; return its text."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        *parents, last = rng.choice([path for path in places(content) if path] or [(None,)])
        if last is None:
            return json.dumps(content)
        holder = content
        for key in parents:
            holder = holder[key]
        change = rng.randrange(6)
        if change == 0:
            del holder[last]
        elif change == 1 and isinstance(holder, list):
            holder.append(holder[last])
        elif change == 2 and isinstance(holder[last], int | float):
            holder[last] = holder[last] * rng.choice([-1, 0, 1.5, 10, 1e6]) + rng.choice([0, 0.1, 1])
        else:
            holder[last] = copy.deepcopy(rng.choice(HOSTILE))
    return json.dumps(content)


def damage_bytes(content, rng):
    """Change, insert, remove or double a few bytes, or cut the file off."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place, change = rng.randrange(len(content) + 1), rng.randrange(5)
        if change == 0:
            del content[place:]
        elif change == 1:
            del content[place : place + rng.randint(1, 8)]
        elif change == 2:
            content[place : place + 1] = bytes([rng.randrange(256)])
        elif change == 3:
            content[place:place] = rng.choice(
                [b"\xff", b"\0", b"9" * 20, b"-", b"e9", b"nan", b"<", b'"', b"[", b"&#0;"]
            )
        else:
            content[place:place] = content[place : place + rng.randint(1, 30)]
    return bytes(content)


def as_bytes(content):
    if isinstance(content, bytes):
        return content
    return (content if isinstance(content, str) else json.dumps(content)).encode()


def damaged_files(content, number, seed):
    """Yield damaged versions of a file, given as JSON, text or bytes."""
    rng = random.Random(seed)
    whole = as_bytes(content)
    for index in range(number):
        if isinstance(content, dict | list) and index % 4:
            yield damage_json(content, rng).encode("utf-8", "surrogatepass")
        else:
            yield damage_bytes(whole, rng)
    yield from (deep(5000).encode(), deep(200_000).encode(), b"", b"{}", b"[]", b"null", b"\xff\xfe", b"1e999")


def damaged_pickles(content, number, seed):
    """Yield damaged versions of a pickle, some of whose content and some of whose bytes are damaged."""
    rng = random.Random(seed)
    for index in range(number):
        if index % 4:
            yield pickle.dumps(json.loads(damage_json(content, rng)), protocol=index % 6)
        else:
            yield damage_bytes(pickle.dumps(content, protocol=index // 4 % 6), rng)


def parquet(rows):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def damaged_parquet(rows, number, seed):
    """Yield damaged versions of a Parquet file: of its bytes, or of values that its columns can hold."""
    rng = random.Random(seed)
    whole = parquet(rows)
    while number:
        if number % 4:
            try:
                yield parquet(json.loads(damage_json(rows, rng), object_hook=as_image))
            except (pyarrow.ArrowException, AttributeError, OverflowError, TypeError, UnicodeError):
                continue  # not a table
        else:
            yield damage_bytes(whole, rng)
        number -= 1


def as_image(value):
    """Return the bytes of an image, which JSON holds as a name, in a JSON object."""
    return value | {"bytes": IMAGES[value["bytes"]]} if value.get("bytes") in IMAGES else value


def png(values):
    file = io.BytesIO()
    PIL.Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def index_mask():
    labels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    labels[5:15, 5:25], labels[20:, 30:] = 1, 2
    return labels


IMAGES = {"photo": png(np.zeros((HEIGHT, WIDTH, 3), np.uint8)), "mask": png(index_mask() // 2 * 255)}


def hub(kind):
    """Rows of a dataset on the Hub, with names for the bytes of images."""
    counts = encode_mask(index_mask() == 2)["counts"].decode()
    image, rle = {"bytes": "photo", "path": "a.png"}, {"size": [HEIGHT, WIDTH], "counts": counts}
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It [SEG] and [SEG]."}]
    return [
        {
            "rle": {"image": image, "mask": rle, "phrases": ["it", "that"]},
            "image": {"image": image, "mask": {"bytes": "mask", "path": None}, "phrases": "it"},
            "conversation": {"image": image, "mask": [rle, rle], "messages": messages},
        }[kind]
    ] * 2


def coco():
    rle = encode_mask(index_mask() == 2)
    segmentations = [[FLAT], [FLAT, FLAT], {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}]
    segmentations.append({"size": [HEIGHT, WIDTH], "counts": [0, 80, 2320]})
    return {
        "images": [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "segmentation": s, "bbox": [0, 0, 1, 1], "iscrowd": 0}
            for i, s in enumerate(segmentations)
        ],
        "categories": [{"id": 1, "name": "rust_patch"}],
    }


def labelme():
    patch = base64.b64encode(png(np.full((10, 20), 255, np.uint8))).decode()
    shapes = [
        {"label": "a", "points": POLYGON, "shape_type": "polygon"},
        {"label": "b", "points": [[5, 5], [24, 14]], "shape_type": "rectangle"},
        {"label": "c", "points": [[30, 20], [35, 20]], "shape_type": "circle"},
        {"label": "d", "points": [[5, 5], [24, 14]], "shape_type": "mask", "mask": patch},
    ]
    return {"imagePath": "a.png", "imageHeight": HEIGHT, "imageWidth": WIDTH, "shapes": shapes}


def cvat():
    shapes = '<polygon label="a" points="5.0,5.0;25.0,5.0;25.0,15.0" z_order="0"/>'
    shapes += '<mask label="b" rle="1, 5, 2, 4" left="3" top="4" width="4" height="3"/>'
    shapes += '<ellipse label="c" cx="30" cy="20" rx="9" ry="4" rotation="30"/><box label="d" xtl="1"/>'
    image = f'<image id="0" name="a.png" width="{WIDTH}" height="{HEIGHT}">{shapes}</image>'
    return f'<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>{image}</annotations>'


def label_studio():
    def region(kind, value):
        size = {"original_width": WIDTH, "original_height": HEIGHT}
        return {"id": "r", "type": kind, "to_name": "image", "image_rotation": 0, "value": value, **size}

    # 9600 values of 255, packed as three runs.
    bits = f"{4 * HEIGHT * WIDTH:032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    bits += "".join(f"111{count - 1:016b}{value:08b}" for count, value in ((4000, 0), (1600, 255), (4000, 0)))
    bits += "0" * (-len(bits) % 8)
    results = [
        region("polygonlabels", {"points": [[10, 10], [50, 10], [50, 50]], "polygonlabels": ["a"]}),
        region(
            "brushlabels", {"rle": [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)], "brushlabels": ["b"]}
        ),
        region("ellipselabels", {"x": 50, "y": 50, "radiusX": 9, "radiusY": 5, "rotation": 9, "ellipselabels": ["c"]}),
    ]
    made = {"result": results, "was_cancelled": False, "ground_truth": False, "created_at": "2026-01-01"}
    return [{"id": 1, "data": {"image": "/data/upload/1/0a1b2c3d-a.png"}, "annotations": [made]}]


def supervisely():
    data = base64.b64encode(zlib.compress(png(np.ones((10, 20), bool)))).decode()
    points = {"exterior": POLYGON, "interior": [[[8, 8], [12, 8], [12, 12]]]}
    objects = [
        {"classTitle": "a", "geometryType": "polygon", "points": points},
        {"classTitle": "b", "geometryType": "bitmap", "bitmap": {"data": data, "origin": [30, 20]}},
    ]
    return {"size": {"height": HEIGHT, "width": WIDTH}, "objects": objects}


def panoptic():
    segments = [{"id": 1, "category_id": 5}, {"id": 2, "category_id": 6}]
    return {
        "images": [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"image_id": 1, "file_name": "mask.png", "segments_info": segments}],
        "categories": [{"id": 5, "name": "a"}, {"id": 6, "name": "b"}],
    }


QUESTION = {"image": "a.png", "mask": "square.png", "phrase": ["it", "that"], "explanation": "so"}
YOLO = "0 0.1 0.1 0.5 0.1 0.5 0.5\n1 0.2 0.2 0.9 0.2 0.9 0.9 0.2 0.9\n1 0.5 0.5 0.1 0.1\n"
# By name: the builder and its options, and the file that is damaged, with its content.
LOADERS = {
    "coco_instances": ({"annotations": "a.json", "images": "images"}, "a.json", coco()),
    "labelme": ({"annotations": "json", "images": "images"}, "json/a.json", labelme()),
    "image_folder": ({"questions": "q.jsonl", "images": "images", "masks": "masks"}, "q.jsonl", QUESTION),
    "image_folder masks": (
        {"questions": "whole.jsonl", "images": "images", "masks": "masks"},
        "masks/square.png",
        png(index_mask() // 2 * 255),
    ),
    "yolo": ({"annotations": "plain", "images": "images"}, "plain/labels/a.txt", YOLO),
    "yolo description": ({"annotations": "yolo/data.yaml"}, "yolo/data.yaml", "train: images\nnames: {0: a, 1: b}\n"),
    "cvat": ({"annotations": "a.xml", "images": "images"}, "a.xml", cvat()),
    "label_studio": ({"annotations": "a.json", "images": "images"}, "a.json", label_studio()),
    "supervisely": ({"annotations": "project"}, "project/ann/a.png.json", supervisely()),
    "class_masks": (
        {"images": "images", "masks": "class", "classes": ["background", "a", "b"]},
        "class/a.png",
        png(index_mask()),
    ),
    "class_masks classes": (
        {"images": "images", "masks": "class", "classes": "map.txt"},
        "map.txt",
        "# x\nbackground:0,0,0::\na:1,1,1::\nb:2,2,2::\n",
    ),
    "coco_panoptic": ({"annotations": "a.json", "images": "images", "masks": "masks"}, "a.json", panoptic()),
}


def write_tree(root):
    """Write the other files that the loaders read."""
    for name in (
        "images",
        "masks",
        "class",
        "json",
        "plain/labels",
        "yolo/images",
        "yolo/labels",
        "project/ann",
        "project/img",
    ):
        (root / name).mkdir(parents=True)
    for name in ("images", "yolo/images", "project/img"):
        PIL.Image.new("RGB", (WIDTH, HEIGHT)).save(root / name / "a.png")
    (root / "yolo/labels/a.txt").write_text(YOLO)
    (root / "plain/classes.txt").write_text("a\nb\n")
    (root / "whole.jsonl").write_text(json.dumps(QUESTION))
    (root / "masks/square.png").write_bytes(png(index_mask() // 2 * 255))
    (root / "class/a.png").write_bytes(png(index_mask()))
    labels = index_mask()
    (root / "masks/mask.png").write_bytes(png(np.stack([labels, labels * 0, labels * 0], axis=2)))


# Published layouts, on a small tree of theirs: the file that is damaged.
PUBLISHED = {
    "ade20k": "ade20k/annotations/training/ADE_train_00000001.png",
    "mapillary": "mapillary/config_v2.0.json",
    "pascal_part": "vlpart/pascal_part/train.json",
    "paco_lvis": "vlpart/paco/annotations/paco_lvis_v1_train.json",
    "refcoco": "refer_seg/refcoco/instances.json",
    "refcoco refs": "refer_seg/refcoco/refs(unc).p",
    "grefcoco": "refer_seg/grefcoco/grefs(unc).json",
    "llava_instruct": "llava_dataset/llava_instruct_150k.json",
    "reason_seg": "reason_seg/ReasonSeg/train/a_utf8.json",
}


# Datasets on the Hub: options in addition to the path.
HUB = {"rle": {}, "image": {}, "conversation": {"messages_column": "messages"}}


def rows_of(name, root, options):
    """Make the rows of a loader, as it does when it prepares them; ones that training would refuse raise here."""
    is_published = name in PUBLISHED
    source, options = (
        (name.split(" ")[0], {}) if is_published else ("mine", {"builder": name.split(" ")[0], **options})
    )
    builder = make_builder(source, str(root), cache_dir=str(root / "cache"), **options)
    if options.get("builder") == "hub":
        records = builder.read_shard(0)
    else:
        read = builder.read_records(str(root)).values()
        records = (json.loads(json.dumps(record)) for records in read for record in records)
    for record in records:
        row = builder.make_row(record)
        if row is not None:
            yield row, load_row_image(row)["original_size"]


@pytest.mark.parametrize(
    "number", [30, pytest.param(10_000, marks=pytest.mark.slow)], ids=["a few files", "ten thousand files"]
)
@pytest.mark.parametrize("name", [*LOADERS, *PUBLISHED, *(f"hub {kind}" for kind in HUB)])
def test_damaged_files_give_errors_or_whole_rows(name, number, tmp_path):
    options = {}
    if name in LOADERS:
        options, path, content = LOADERS[name]
        write_tree(tmp_path)
        (tmp_path / path).write_bytes(as_bytes(content))
        files = damaged_files(content, number, seed=number)
    elif name in PUBLISHED:
        path = PUBLISHED[name]
        shutil.copytree(TREE, tmp_path, dirs_exist_ok=True)
        content = (TREE / path).read_bytes()
        if path.endswith(".p"):
            files = damaged_pickles(pickle.loads(content), number, seed=number)
        else:
            files = damaged_files(content if path.endswith(".png") else json.loads(content), number, seed=number)
    else:
        kind, path = name.split(" ")[1], "rows.parquet"
        options, content = {"path": path, **HUB[kind]}, hub(kind)
        (tmp_path / path).write_bytes(parquet(json.loads(json.dumps(content), object_hook=as_image)))
        files = damaged_parquet(content, number, seed=number)
    assert list(rows_of(name, tmp_path, options))

    num_rows = num_errors = 0
    for index, damaged in enumerate(files):
        (tmp_path / path).write_bytes(damaged)
        start = time.monotonic()
        try:
            for row, size in rows_of(name, tmp_path, options):
                num_rows += 1
                image = row["image"]["path"]
                assert row["image"]["bytes"] or (image.startswith(str(tmp_path)) and ".." not in image)
                for rle in [target["rle"] for target in row["targets"]] + ([row["ignore"]] if row["ignore"] else []):
                    assert list(Mask.from_rle(rle).size) == size, damaged
        except (OSError, ValueError) as error:
            num_errors += 1
            assert str(error), damaged
        except Exception as error:
            raise AssertionError(f"file {index} of {name}: {damaged[:2000]!r}") from error
        assert time.monotonic() - start < MAX_SECONDS, damaged[:2000]
    assert num_errors and (num_rows or number < 100)
