"""The streaming mixture: every row is used once, resuming is exact, and rows equal the prepared ones.

    accelerate launch --config_file recipes/accelerate/ddp.yaml --num_processes 2 \\
        tests/data/test_streaming.py DIRECTORY

is what `test_two_processes_with_two_workers_each_share_the_rows` starts.
"""

import json
import sys
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from unittest.mock import Mock

import pytest
from accelerate import PartialState, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import Image, IterableDataset, load_dataset
from datasets.distributed import split_dataset_by_node
from datasets.table import embed_table_storage
from fixtures.paths import TREE
from fixtures.rows import comparable, dataset, image_file, one_source, segmentation_row, vqa_row
from fixtures.sources import NAMES
from fixtures.tiny_training import assert_gradients_equal, build_model, make_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, get_worker_info
from workers.launching import launch

from data_scripts import load_source, source
from data_scripts.source import SourceBuilder
from lisa_hf import LisaTrainer
from lisa_hf.data import mixture
from lisa_hf.data.mixture import MixtureDataset
from lisa_hf.data.streaming import StreamingMixtureDataset
from lisa_hf.training.checkpointing import write_manifest


# The sources have a bad row.
SkippingMixture = partial(StreamingMixtureDataset, on_bad_row="skip")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Sources of 7, 9 and 4 rows, of which the first has a bad row and the second an empty one."""
    directory = tmp_path_factory.mktemp("images")
    image = image_file(directory / "image.png")
    classes = [segmentation_row("classes", index, image) for index in range(7)]
    classes[3]["image"]["path"] = str(directory / "missing.png")
    things = [segmentation_row("things", index, image) for index in range(9)]
    things[5]["targets"] = []
    return {
        "classes": dataset(*classes),
        "things": dataset(*things),
        "talk": dataset(*[vqa_row("talk", index, image) for index in range(4)]),
    }


@pytest.fixture(scope="module")
def streamed(prepared):
    """The same rows in 7, 3 and 1 shards."""
    return {name: rows.to_iterable_dataset(num_shards=len(rows) % 8 or 1) for name, rows in prepared.items()} | {
        "things": prepared["things"].to_iterable_dataset(num_shards=3),
        "talk": prepared["talk"].to_iterable_dataset(),
    }


@pytest.fixture(autouse=True)
def bad_rows_are_tolerated(request, monkeypatch):
    if "streamed" in request.fixturenames:
        monkeypatch.setattr(mixture, "MAX_BAD_SHARE", 1)


def drawn(stream, number):
    return [comparable(item) for item in islice(stream, number)]


@given(
    num_rows=st.integers(1, 30),
    num_shards=st.integers(1, 8),
    num_readers=st.integers(1, 6),
    buffer_size=st.sampled_from([1, 4, 100]),
)
@settings(max_examples=25, deadline=None)
def test_a_pass_deals_every_row_to_one_reader(tmp_path_factory, num_rows, num_shards, num_readers, buffer_size):
    sources = one_source(num_rows, min(num_shards, num_rows), tmp_path_factory.getbasetemp())
    dealt = {0: Counter(), 1: Counter(), 2: Counter()}
    for rank in range(num_readers):
        data = SkippingMixture(sources, rank=rank, num_ranks=num_readers, shuffle_buffer_size=buffer_size)
        for item in data:
            this_pass = data.state_dict()["positions"]["classes"]["pass"]
            if this_pass not in dealt:
                break
            dealt[this_pass][item["image_id"]] += 1
    for rows in dealt.values():
        assert rows == Counter({f"classes/{index}": 1 for index in range(num_rows)})


def test_passes_and_seeds_give_other_orders(tmp_path):
    sources = one_source(20, 4, tmp_path)

    def order(seed):
        return [item["image_id"] for item in islice(SkippingMixture(sources, seed=seed), 40)]

    assert order(0) == order(0)
    first, second, other = order(0)[:20], order(0)[20:], order(1)[:20]
    assert sorted(first) == sorted(second) == sorted(other)
    for one, another in ((first, second), (first, other), (first, sorted(first))):
        assert sum(a == b for a, b in zip(one, another)) < 10


def test_sources_come_in_the_proportions_of_their_weights(streamed):
    for weights, shares in (
        (None, {"classes": 4.5 / 12, "things": 4.5 / 12, "talk": 3 / 12}),
        ({"classes": 8, "things": 0, "talk": 2}, {"classes": 0.8, "things": 0, "talk": 0.2}),
    ):
        items = list(islice(SkippingMixture(streamed, weights=weights), 500))
        counts = Counter(item["source"] for item in items)
        for name, share in shares.items():
            assert abs(counts[name] - 500 * share) <= 5 * (500 * share * (1 - share)) ** 0.5
    assert {item["image_id"] for item in items} == {f"classes/{i}" for i in (0, 1, 2, 4, 5, 6)} | {
        f"talk/{i}" for i in range(4)
    }
    assert sum(item["num_skipped"] for item in items) > 0


# Resuming


@given(k=st.integers(0, 40), num_ranks=st.sampled_from([1, 2, 4]), data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_state_resumes_exactly_at_any_item(streamed, k, num_ranks, data):
    rank = data.draw(st.integers(0, num_ranks - 1))

    def stream():
        return SkippingMixture(streamed, rank=rank, num_ranks=num_ranks, seed=3)

    expected = drawn(stream(), k + 12)[k:]
    interrupted, resumed = stream(), stream()
    drawn(interrupted, k)
    resumed.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
    assert drawn(resumed, 7) == expected[:7]
    again = stream()
    again.load_state_dict(resumed.state_dict())
    assert drawn(again, 5) == expected[7:]
    assert drawn(resumed, 5) == expected[:5]  # each iteration begins where the state was


def test_the_state_of_another_reader_or_other_sources_is_refused(streamed):
    one, other = (SkippingMixture(streamed, rank=rank, num_ranks=2) for rank in (0, 1))
    next(iter(one))
    other.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match=r"expected the state of reader 1 of 2, got that of \[0, 2\]. Resume"):
        next(iter(other))
    fewer = SkippingMixture({"talk": streamed["talk"]})
    with pytest.raises(ValueError, match=r"expected a state for the sources \['talk'\], got one for"):
        fewer.load_state_dict(one.state_dict())


def loader_of(data, rank, num_ranks, num_workers, collate_fn=list):
    """The batches of one process, two items each, as the Trainer's loader has them."""
    loader = DataLoader(data, batch_size=2, num_workers=num_workers, collate_fn=collate_fn)
    if isinstance(data, StreamingMixtureDataset):
        rank, num_ranks = 0, 1
    return prepare_data_loader(loader, num_processes=num_ranks, process_index=rank)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
@given(k=st.integers(0, 10))
@settings(max_examples=4, deadline=None)
def test_skipping_batches_as_the_trainer_does_is_exact(prepared, streamed, streaming, num_workers, num_ranks, k):
    for rank in range(num_ranks):

        def loader():
            if streaming:
                data = SkippingMixture(streamed, rank=rank, num_ranks=num_ranks, seed=1)
            else:
                data = MixtureDataset(prepared, length=24 * num_ranks, seed=1, on_bad_row="skip")
            return loader_of(data, rank, num_ranks, num_workers)

        expected = [[comparable(item) for item in batch] for batch in islice(loader(), 12)]
        resumed = islice(skip_first_batches(loader(), k), 12 - k)
        assert [[comparable(item) for item in batch] for batch in resumed] == expected[k:]


def test_a_loader_worker_is_a_reader_with_a_state(streamed):
    def stream(rank, num_ranks):
        return SkippingMixture(streamed, rank=rank, num_ranks=num_ranks)

    def items_and_state(items):
        return [comparable(item) for item in items], get_worker_info().dataset.state_dict()

    for rank in (0, 1):
        batches = list(islice(loader_of(stream(rank, 2), rank, 2, 2, items_and_state), 10))
        for worker in (0, 1):
            expected = drawn(stream(2 * rank + worker, 4), 10)
            assert [item for items, _ in batches[worker::2] for item in items] == expected
            # Whoever keeps the states, as torchdata's StatefulDataLoader does, resumes without making the items again.
            reader = stream(2 * rank + worker, 4)
            reader.load_state_dict(batches[2 + worker][1])
            assert drawn(reader, 6) == expected[4:]


class Counted(SourceBuilder):
    """Rows of one image, which counts how many were made."""

    num_records = 480

    def annotation_files(self, data_dir):
        return []

    def read_records(self, data_dir):
        return {"train": [[index, "é" * (index % 7)] for index in range(self.num_records)]}

    def make_row(self, record):
        Counted.num_made += 1
        index, _ = record
        return None if index % 10 == 9 else segmentation_row("classes", index, f"{self.config.data_dir}/image.png", 1)


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """A stream of 480 records in 16 shards of about 7 pieces each."""
    monkeypatch.setattr(source, "PIECE_BYTES", 100)
    monkeypatch.setattr(Counted, "num_made", 0, raising=False)
    image_file(tmp_path / "image.png")
    return Counted(str(tmp_path), cache_dir=str(tmp_path)).as_streaming_dataset("train")


def test_resuming_reads_no_more_than_the_window_and_its_pieces(counted):
    def stream():
        return SkippingMixture({"classes": counted}, shuffle_buffer_size=4)

    expected = drawn(stream(), 400)
    interrupted, resumed = stream(), stream()
    drawn(interrupted, 390)
    resumed.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
    Counted.num_made = 0
    assert drawn(resumed, 10) == expected[390:]
    assert Counted.num_made < 60


def test_pieces_have_the_records_of_their_shard(counted):
    pieces = counted.reshard()
    assert pieces.num_shards > 5 * counted.num_shards
    found = [row for i in range(pieces.num_shards) for row in pieces.shard(pieces.num_shards, i).decode(False)]
    assert found == list(counted.decode(False))


@pytest.mark.parametrize("num_readers", [1, 3, 20])
def test_the_order_is_that_of_datasets(counted, num_readers):
    shuffled = counted.decode(False).shuffle(seed=5, buffer_size=7, max_buffer_input_shards=1)
    strategy = "shards" if num_readers <= 16 else "examples"
    for reader in {0, num_readers - 1}:
        expected = []
        for number in range(2):
            share = split_dataset_by_node(shuffled, (reader + number) % num_readers, num_readers, strategy)
            share.set_epoch(number)
            expected += [row["image_id"] for row in share]
        options = {"seed": 5, "rank": reader, "num_ranks": num_readers, "shuffle_buffer_size": 7}
        items = StreamingMixtureDataset({"classes": counted}, **options)
        assert [item["image_id"] for item in islice(items, len(expected))] == expected


def test_parquet_resumes_within_a_file(tmp_path):
    image, path = image_file(tmp_path / "image.png"), str(tmp_path / "rows.parquet")
    dataset(*[segmentation_row("classes", index, image) for index in range(60)]).to_parquet(path, batch_size=7)
    options = {"data_files": path, "split": "train", "streaming": True}
    converted = load_source("mine", builder="hub", path=path, streaming=True)
    for rows in (load_dataset("parquet", **options), converted):
        assert rows.reshard().num_shards == 9
        first = SkippingMixture({"classes": rows}, shuffle_buffer_size=8)
        expected = drawn(first, 40)
        again = SkippingMixture({"classes": rows}, shuffle_buffer_size=8)
        drawn(again, 30)
        first.load_state_dict(again.state_dict())
        assert drawn(first, 10) == expected[30:]
        # Loader workers share the files.
        batches = islice(loader_of(SkippingMixture({"classes": rows}), 0, 1, 2), 30)
        assert len({item["image_id"] for batch in batches for item in batch}) == 60


def test_data_that_has_lost_rows_is_refused(counted, tmp_path):
    stream = SkippingMixture({"classes": counted})
    drawn(stream, 300)
    state = stream.state_dict()
    state["positions"]["classes"]["window"][0][2] += 1000
    stream.load_state_dict(state)
    with pytest.raises(ValueError, match="'classes': expected the same rows as when the state was saved"):
        next(iter(stream))
    with pytest.raises(ValueError, match="seed: expected 0, as when the state was saved, got 1. Resume with the same"):
        SkippingMixture({"classes": counted}, seed=1).load_state_dict(state)


# Bad rows


def test_a_source_of_empty_rows_raises_instead_of_looping(tmp_path, monkeypatch):
    monkeypatch.setattr(mixture, "MAX_DRAWS", 10)
    with pytest.raises(ValueError, match="'classes': expected a usable row among 10, got 0 bad"):
        next(iter(SkippingMixture(one_source(3, 1, tmp_path, targets=[]))))
    missing = {"path": str(tmp_path / "missing.png"), "bytes": None}
    with pytest.raises(ValueError, match="'classes': expected a usable row among 10, got 10 bad .*missing.png"):
        next(iter(SkippingMixture(one_source(3, 1, tmp_path, image=missing))))


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_source_without_rows_raises_instead_of_looping(tmp_path, num_ranks):
    def no_rows(shards):
        yield from ()

    void = one_source(1, 1, tmp_path)["classes"]
    void = IterableDataset.from_generator(no_rows, void.features, gen_kwargs={"shards": [0, 1]})
    with pytest.raises(ValueError, match="Source 'void': expected at least one row"):
        SkippingMixture({"void": void})
    settings = {"rank": num_ranks - 1, "num_ranks": num_ranks, "weights": {"void": 1}}
    with pytest.raises(ValueError, match="Source 'void': expected at least one row"):
        next(iter(SkippingMixture({"void": void}, **settings)))


def test_more_than_one_percent_of_bad_rows_raises(prepared):
    half_broken = prepared | {"classes": prepared["classes"].select([0, 3, 3, 1])}
    sources = {name: rows.to_iterable_dataset() for name, rows in half_broken.items()}
    with pytest.raises(ValueError, match="'classes': expected at most 1% of bad rows.*missing.png"):
        list(islice(SkippingMixture(sources), 1000))
    assert len(list(islice(SkippingMixture(sources), 100))) == 100
    with pytest.raises(ValueError, match="Row 'classes/3' of 'classes'"):
        list(islice(StreamingMixtureDataset(sources), 100))


def test_contradictory_arguments_are_refused(prepared, streamed):
    for arguments, message in (
        ({"sources": prepared}, "'classes': expected a streamed IterableDataset, got Dataset"),
        ({"rank": 2, "num_ranks": 2}, "got rank 2 and num_ranks 2"),
        ({"shuffle_buffer_size": 0}, "1 row or more, got 0"),
        ({"weights": {"clases": 1}}, r"Did you mean `classes`\?"),
    ):
        with pytest.raises(ValueError, match=message):
            SkippingMixture(**{"sources": streamed, **arguments})


# Rows


@pytest.mark.parametrize("name", ["shapes", "pascal_part", "reason_seg", *NAMES])
def test_streamed_rows_are_the_prepared_and_the_parquet_rows(name, tmp_path):
    options = {"num_train_scenes": 20, "image_size": 64} if name == "shapes" else {"data_dir": str(TREE)}
    options["cache_dir"] = str(tmp_path / "cache")
    rows = load_source(name, **options)
    shard = rows.with_format("arrow").map(embed_table_storage, batched=True)
    shard.to_parquet(tmp_path / "rows.parquet")
    parquet = {"path": "parquet", "data_files": str(tmp_path / "rows.parquet"), "split": "train"}
    kinds = [
        rows,
        load_source(name, streaming=True, **options),
        load_dataset(**parquet, cache_dir=options["cache_dir"]),
        load_dataset(**parquet, streaming=True),
    ]

    def content(row):
        image = row["image"]
        return {**row, "image": image["bytes"] or Path(image["path"]).read_bytes()}

    expected, *others = [[content(row) for row in rows.cast_column("image", Image(decode=False))] for rows in kinds]
    assert len(expected) > 0
    for found in others:
        assert found == expected

    # And so are the items: one pass over each stream has the images of the rows.
    for streamed in (kinds[1], kinds[3]):
        items = list(islice(SkippingMixture({name: streamed}), len(expected)))
        assert sorted(item["image_id"] for item in items) == sorted(row["image_id"] for row in expected)
        assert all(item["image"].mode == "RGB" and item["questions"] for item in items)


# Trainer


def make_stream_trainer(directory, rank=0, num_ranks=1, **arguments):
    data = SkippingMixture(one_source(64, 8, directory), rank=rank, num_ranks=num_ranks)
    arguments = {"per_device_train_batch_size": 2, "dataloader_num_workers": 2} | arguments
    return make_trainer(*build_model(), directory, data, **arguments)


def test_a_run_resumes_exactly_from_a_checkpoint(tmp_path):
    arguments = {"max_steps": 4, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1}
    runs = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        trainer = make_stream_trainer(tmp_path, **arguments)
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(trainer)
    whole, resumed = (trainer.recorder.gradients for trainer in runs)
    assert len(whole) == 4 and len(resumed) == 1
    assert_gradients_equal(resumed[0], whole[3])
    assert runs[1].state.log_history[-2]["loss"] == pytest.approx(runs[0].state.log_history[-2]["loss"], rel=1e-5)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_resumed_run_makes_no_batch_again(tmp_path, num_workers, monkeypatch):
    options = {"dataloader_num_workers": num_workers, "save_strategy": "steps", "save_steps": 5}
    make_stream_trainer(tmp_path, max_steps=5, **options).train()
    batches = {}
    for name in ("with", "without"):
        trainer = make_stream_trainer(tmp_path, max_steps=10, **options)
        batches[name] = []
        count = LisaTrainer.get_batch_samples

        def get_batch_samples(*args, seen=batches[name], **kwargs):
            samples, number = count(*args, **kwargs)
            seen += [batch["meta"].image_ids for batch in samples]
            return samples, number

        monkeypatch.setattr(LisaTrainer, "get_batch_samples", get_batch_samples)
        skip = Mock(wraps=skip_first_batches)
        monkeypatch.setattr("transformers.trainer.skip_first_batches", skip)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
        monkeypatch.undo()
        assert skip.called == (name == "without")
        # As a checkpoint of an earlier version.
        for file in ("stream_state_0.json", "manifest.json"):
            (tmp_path / "checkpoint-5" / file).unlink(missing_ok=True)
        write_manifest(tmp_path / "checkpoint-5")
    assert batches["with"] == batches["without"] and len(batches["with"]) == 5


def test_the_state_of_another_number_of_workers_is_not_used(tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 2}
    make_stream_trainer(tmp_path, max_steps=2, **options).train()
    trainer = make_stream_trainer(tmp_path, max_steps=3, dataloader_num_workers=1)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = "expected 1 processes with 2 loader workers each, got 1 processes with 1 loader workers each"
    assert expected in caplog.text
    assert trainer.state.global_step == 3


def test_the_stream_of_another_process_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected the stream of process 0 of 1, got that of rank 1 of 2"):
        make_stream_trainer(tmp_path, rank=1, num_ranks=2).train()


def read_two_passes(directory):
    """Writes the images of this process's batches, until two passes over the rows must have been read by all."""
    state = PartialState(cpu=True)
    trainer = make_stream_trainer(directory, state.process_index, state.num_processes)
    trainer.data_collator = lambda items: {"image_ids": [item["image_id"] for item in items]}
    batches = islice(trainer.get_train_dataloader(), 2 * 64 // 2 // state.num_processes)
    image_ids = [batch["image_ids"] for batch in batches]
    Path(directory, f"{state.process_index}.json").write_text(json.dumps(image_ids))
    state.wait_for_everyone()
    state.destroy_process_group()


def test_two_processes_with_two_workers_each_share_the_rows(tmp_path):
    launch(__file__, tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    rows = Counter(f"classes/{index}" for index in range(64))
    for one_pass in (slice(0, 16), slice(16, 32)):
        assert Counter(image_id for batches in ranks for batch in batches[one_pass] for image_id in batch) == rows
    assert all(len(batch) == 2 for batches in ranks for batch in batches)


if __name__ == "__main__":
    read_two_passes(sys.argv[1])
