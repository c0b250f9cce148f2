"""Corpus, split, batches, and the bigram model, which is checked against a count by hand."""

from __future__ import annotations

import math
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from qgalore_compile.training import data
from qgalore_compile.training.data import (
    Corpus,
    bigram_loss,
    check_lengths,
    load_corpus,
    training_batch,
    validation_batches,
)


def _folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text)
    return root


def _text(part: torch.Tensor) -> bytes:
    return bytes(part.tolist())


# -- reading and splitting ------------------------------------------------------------------------------------------


def test_default_corpus_is_the_library_without_its_tests_and_packages() -> None:
    corpus = load_corpus()
    assert len(corpus.train) > 5_000_000
    assert 0.03 < len(corpus.validation) / (len(corpus.train) + len(corpus.validation)) < 0.25
    assert b'"""Heap queue algorithm' in _text(corpus.train) + _text(corpus.validation)
    assert b"class ListTest(list_tests.CommonTest)" not in _text(corpus.train) + _text(corpus.validation)


def test_folder_is_split_by_file_and_no_byte_is_lost(tmp_path: Path) -> None:
    files = {f"{i % 3}/{i:03d}.txt": f"<{i}>".encode() * (i + 1) for i in range(60)}
    corpus = load_corpus(_folder(tmp_path, files))
    train, validation = _text(corpus.train), _text(corpus.validation)
    assert corpus.train_files + corpus.validation_files == 60
    assert corpus.validation_files >= 1
    for text in files.values():
        assert (text in train) != (text in validation)
    assert len(train) + len(validation) == sum(map(len, files.values()))


def test_a_file_stays_on_its_side_when_others_come(tmp_path: Path) -> None:
    files = {f"{i}.txt": f"<{i}>".encode() for i in range(60)}
    before = _text(load_corpus(_folder(tmp_path / "a", files)).validation)
    more = {f"more/{i}.txt": f"({i})".encode() for i in range(60)}
    after = _text(load_corpus(_folder(tmp_path / "b", {**files, **more})).validation)
    kept = [text for text in files.values() if text in before]
    assert kept
    assert all(text in after for text in kept)
    assert sum(text in after for text in files.values()) == len(kept)


def test_two_files_are_one_for_each_part(tmp_path: Path) -> None:
    corpus = load_corpus(_folder(tmp_path, {"a": b"aaaa", "b": b"bbbb"}))
    assert {_text(corpus.train), _text(corpus.validation)} == {b"aaaa", b"bbbb"}


def test_single_file_is_validated_on_its_tail(tmp_path: Path) -> None:
    text = bytes(range(200))
    path = tmp_path / "text"
    path.write_bytes(text)
    corpus = load_corpus(path)
    assert _text(corpus.train) == text[:180]
    assert _text(corpus.validation) == text[180:]


def test_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    text = bytes(range(1, 201))
    folder = _folder(tmp_path, {"only.txt": text, "empty.txt": b""})
    assert _text(load_corpus(folder).train) == text[:180]


def test_hidden_and_binary_files_are_left_out_of_a_folder(tmp_path: Path) -> None:
    files = {"a.txt": b"text", "b.txt": b"more", ".git/config": b"hidden", ".env": b"hidden", "c.bin": b"\x00binary"}
    corpus = load_corpus(_folder(tmp_path, files))
    assert sorted(_text(corpus.train) + _text(corpus.validation)) == sorted(b"textmore")


def test_fingerprint_tells_texts_and_splits_apart() -> None:
    def corpus(train: list[int], validation: list[int]) -> Corpus:
        return Corpus("", torch.tensor(train, dtype=torch.uint8), torch.tensor(validation, dtype=torch.uint8), 1, 1)

    assert corpus([1, 2], [3]).fingerprint == corpus([1, 2], [3]).fingerprint
    assert corpus([1, 2], [3]).fingerprint != corpus([1], [2, 3]).fingerprint
    assert corpus([1, 2], [3]).fingerprint != corpus([1, 2], [4]).fingerprint


def test_nothing_at_the_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such file or folder; give a text file or a folder"):
        load_corpus(tmp_path / "nowhere")


@pytest.mark.parametrize("files", [{}, {"empty.txt": b""}, {"c.bin": b"\x00"}])
def test_folder_without_text_is_refused(tmp_path: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match="no text in it"):
        load_corpus(_folder(tmp_path, files))


def test_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="0 bytes are too few"):
        load_corpus(tmp_path / "empty")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "locked"
    path.write_bytes(b"text")
    path.chmod(0)
    with pytest.raises(ValueError, match=r"cannot read .*locked: Permission denied"):
        load_corpus(path)


def test_path_that_is_neither_file_nor_folder_is_refused_when_it_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"text")

    def refuse(self: Path, *args: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"cannot read .*text: Permission denied; --data takes"):
        load_corpus(path)


def test_library_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python.zip")})
    with pytest.raises(ValueError, match=r"no Python sources .*python\.zip.*--data"):
        load_corpus()


def test_text_shorter_than_a_sequence_is_refused_with_the_longest_that_fits(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(100))
    corpus = load_corpus(tmp_path / "text")
    check_lengths(corpus, 9)
    with pytest.raises(ValueError, match=r"validation part has 10 bytes, one sequence needs 11; .*at most 9 here"):
        check_lengths(corpus, 10)


# -- batches --------------------------------------------------------------------------------------------------------

TOKENS = torch.arange(250, dtype=torch.uint8)  # every byte once: a value tells its place


def test_targets_are_the_inputs_moved_on_by_one() -> None:
    inputs, targets = training_batch(TOKENS, seed=0, step=0, batch=5, seq=17)
    assert inputs.shape == targets.shape == (5, 17)
    assert inputs.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    def batch(seed: int, step: int) -> torch.Tensor:
        return training_batch(TOKENS, seed=seed, step=step, batch=8, seq=4)[0]

    torch.manual_seed(1)
    first = batch(3, 5)
    torch.manual_seed(2)
    batch(3, 4)
    assert torch.equal(first, batch(3, 5))
    assert not torch.equal(first, batch(3, 6))
    assert not torch.equal(first, batch(4, 5))
    assert not torch.equal(first, batch(3 + 2**32, 5))


def test_two_micro_batches_hold_what_one_batch_of_both_holds() -> None:
    small = training_batch(TOKENS, seed=0, step=9, batch=4, seq=6)[0]
    large = training_batch(TOKENS, seed=0, step=9, batch=8, seq=6)[0]
    assert torch.equal(small, large[:4])


def test_every_place_is_drawn_equally_often() -> None:
    starts = training_batch(TOKENS, seed=0, step=0, batch=48_000, seq=10)[0][:, 0]
    counts = torch.bincount(starts, minlength=240).double()
    assert len(counts) == 240  # the last window ends with the last byte
    chi_squared = ((counts - 200) ** 2 / 200).sum().item()
    assert 150 < chi_squared < 340  # 239 degrees of freedom: beyond four standard deviations on either side


def test_validation_batches_are_spread_and_the_same_each_time() -> None:
    def windows() -> list[torch.Tensor]:
        return [inputs for inputs, _ in validation_batches(TOKENS, batch=4, seq=20, count=10)]

    assert [len(inputs) for inputs in windows()] == [4, 4, 2]
    starts = torch.cat(windows())[:, 0]
    assert torch.equal(starts, torch.arange(10) * 23)
    assert torch.equal(torch.cat(windows()), torch.cat(windows()))


def test_validation_windows_do_not_overlap_however_many_are_asked_for() -> None:
    inputs = torch.cat([inputs for inputs, _ in validation_batches(TOKENS, batch=3, seq=40, count=1000)])
    assert len(inputs.unique()) == inputs.numel()
    assert len(inputs) == 5


# -- the bigram model -----------------------------------------------------------------------------------------------


def _bigram_by_hand(train: bytes, validation: bytes, alpha: float) -> float:
    counts = np.zeros((256, 256))
    for a, b in pairwise(train):
        counts[a, b] += 1
    losses = [-math.log((counts[a, b] + alpha) / (counts[a].sum() + 256 * alpha)) for a, b in pairwise(validation)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("alphabet", [3, 256])
def test_bigram_loss_is_that_of_a_count_by_hand(alphabet: int) -> None:
    generator = np.random.default_rng(0)
    train = bytes(generator.integers(alphabet, size=4000, dtype=np.uint8))
    validation = bytes(generator.integers(alphabet, size=500, dtype=np.uint8))
    expected = min(_bigram_by_hand(train, validation, alpha) for alpha in (1.0, 0.1, 0.01))
    tensors = [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (train, validation)]
    assert bigram_loss(*tensors) == pytest.approx(expected, rel=1e-9)


def test_pairs_are_counted_across_the_borders_of_chunks() -> None:
    tokens = torch.randint(256, (1001,), dtype=torch.uint8)
    whole = data._pair_counts(tokens)
    assert whole.sum() == 1000
    for chunk in (1, 7, 1000, 1001):
        assert torch.equal(data._pair_counts(tokens, chunk), whole)


def test_bigram_loss_of_a_text_that_repeats_itself_is_almost_zero() -> None:
    tokens = torch.tensor([1, 2, 3] * 1000, dtype=torch.uint8)
    assert bigram_loss(tokens, tokens) < 0.01
