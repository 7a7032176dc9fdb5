"""Find rows with an image of a benchmark or of another source: by COCO id, or by how the image looks."""

import hashlib
from collections import Counter
from functools import partial

import numpy as np
import pyarrow as pa
from datasets import Dataset

from lisa_hf.data.image_keys import coco_id, perceptual_hash
from lisa_hf.data.images import read_file, undecoded

from .engines import Engine, map_pieces


# Maximum number of differing bits, of 64, between two perceptual hashes of the same photo. Copies that are
# recompressed, halved or squeezed into a square differ in at most 4; two drawn scenes in at least 8, and two photos in
# at least 18.
MAX_DISTANCE = 4
IMAGES_PER_PIECE = 1000


class KnownImages:
    """Images to exclude from other rows, each with the name of its owner, a benchmark or source."""

    def __init__(self):
        self.names: list[str] = []
        self.coco_owners: dict[int, int] = {}  # position in `names` by COCO id
        self.hashes = np.empty(0, dtype=np.uint64)
        self.hash_owners = np.empty(0, dtype=np.int64)

    def add(self, name: str, rows: Dataset, engine: Engine = "datasets", num_workers: int = 1):
        """Read the images of rows, and store their keys under a name.

        Raises:
            ValueError: If an image cannot be read, because it could then not be found elsewhere.
        """
        num_pieces = -(-len(rows) // IMAGES_PER_PIECE)
        images = undecoded(rows).select_columns("image")
        pieces = map_pieces(partial(_read_keys, images), num_pieces, engine, num_workers, f"images of {name}")
        owner = len(self.names)
        self.names.append(name)
        for coco_ids, _ in pieces:
            for found in coco_ids:
                self.coco_owners.setdefault(found, owner)
        hashes = np.setdiff1d(np.array([key for _, keys in pieces for key in keys], dtype=np.uint64), self.hashes)
        self.hashes = np.concatenate([self.hashes, hashes])
        self.hash_owners = np.concatenate([self.hash_owners, np.full(len(hashes), owner)])

    def find(self, path: str | None, content: bytes) -> str | None:
        """Return the name of the owner of an image, or None."""
        owner = self.coco_owners.get(coco_id(path or ""))
        if owner is None:
            try:
                key = perceptual_hash(content)
            except ValueError:  # the mixture reports or skips it
                return None
            if key is None or not len(self.hashes):
                return None
            distances = np.bitwise_count(self.hashes ^ np.uint64(key))
            nearest = int(distances.argmin())
            if distances[nearest] > MAX_DISTANCE:
                return None
            owner = self.hash_owners[nearest]
        return self.names[owner]

    def filter(self, table: pa.Table) -> tuple[pa.Table, Counter[str]]:
        """Return the rows whose embedded images have no owner, and the number of other rows by owner."""
        images = table["image"].combine_chunks()
        paths, contents = images.field("path").to_pylist(), images.field("bytes")
        found = [self.find(path, content.as_py()) for path, content in zip(paths, contents)]
        return table.filter(pa.array([name is None for name in found])), Counter(filter(None, found))

    def fingerprint(self) -> str:
        """Return a digest of all names and keys."""
        digest = hashlib.sha256(repr((self.names, sorted(self.coco_owners.items()))).encode())
        digest.update(self.hashes.tobytes() + self.hash_owners.tobytes())
        return digest.hexdigest()


def _read_keys(rows: Dataset, piece: int) -> tuple[list[int], list[int]]:
    """Return the COCO ids and perceptual hashes of a piece of the rows, sorted."""
    coco_ids, hashes = set(), set()
    start = piece * IMAGES_PER_PIECE
    for row in rows.select(range(start, min(start + IMAGES_PER_PIECE, len(rows)))):
        path = row["image"]["path"] or ""
        try:
            coco_ids.add(coco_id(path))
            hashes.add(perceptual_hash(read_file(row)))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path!r}: {error}. Restore it, or do not exclude these images.") from error
    return sorted(coco_ids - {None}), sorted(hashes - {None})
