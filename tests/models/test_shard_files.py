"""What a pass over a shard leaves behind is on disk, and memory does not grow with it."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from models.shard_files import PairSample, RowFile

LENGTH = 196
BATCH = 256


def test_rows_come_back_as_they_were_appended(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(3000, size=(1000, 7)).astype(np.uint16)
    file = RowFile(tmp_path / "rows", np.uint16)

    for start in range(0, 1000, 300):
        file.append(rows[start : start + 300])

    assert (file.mapped() == rows).all() and file.mapped().dtype == np.uint16
    assert RowFile(tmp_path / "none", np.float32).mapped().shape == (0, 0)


def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    """40 MB of index vectors and their sample leave memory where 4 MB leave it."""
    small, large = (_peak(lambda n=n: _pass(tmp_path / str(n), n)) for n in (10_240, 102_400))  # type: ignore[misc]

    assert large < 1.2 * small < 5_000_000


def test_a_sample_is_uniform_and_the_same_for_a_seed(tmp_path: Path) -> None:
    times_taken = np.zeros(40)
    for seed in range(300):
        sample = _sampled(tmp_path / str(seed), 10, 40, seed)
        for place in range(10):
            times_taken[int(sample.caption(place))] += 1

    # each pair is taken with probability 1/4: 75 of 300 times, with a standard deviation of 7.5
    assert times_taken.sum() == 3000 and times_taken.min() > 45 and times_taken.max() < 105
    again = _sampled(tmp_path / "again", 10, 40, 7)
    assert [again.caption(i) for i in range(10)] == [_read(tmp_path / "7", i) for i in range(10)]


def test_a_sampled_pair_keeps_its_image_caption_and_vector_together(tmp_path: Path) -> None:
    sample = _sampled(tmp_path / "s", 5, 30, 1)

    for place, vector in enumerate(sample.vectors(0, 5)):
        caption = sample.caption(place)
        assert sample.image(place) == caption.encode() and (vector == int(caption)).all()
    assert len(list((tmp_path / "s").glob("*.image"))) == len(sample) == 5


def test_fewer_pairs_than_the_sample_holds_are_all_kept_in_their_order(tmp_path: Path) -> None:
    sample = _sampled(tmp_path / "s", 50, 30, 1)

    assert [sample.caption(i) for i in range(len(sample))] == [str(n) for n in range(30)]


def _sampled(folder: Path, size: int, offered: int, seed: int) -> PairSample:
    sample = PairSample(folder, size, seed)
    for n in range(offered):
        sample.offer(str(n).encode(), str(n), np.full(4, n, np.uint16))
    return sample


def _read(folder: Path, place: int) -> str:
    return (folder / f"{place}.caption").read_text()


def _pass(folder: Path, count: int) -> None:
    folder.mkdir()
    rows, sample = RowFile(folder / "rows", np.uint16), PairSample(folder / "sample", 100, 0)
    for start in range(0, count, BATCH):
        batch = np.full((BATCH, LENGTH), start % 3000, np.uint16)
        rows.append(batch)
        for vector in batch:
            sample.offer(b"image", "caption", vector)
    mapped = rows.mapped()
    assert mapped.shape == (count, LENGTH)
    assert sum(int(mapped[i : i + BATCH].max()) for i in range(0, count, BATCH)) > 0


def _peak(run: Callable[[], None]) -> int:
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
