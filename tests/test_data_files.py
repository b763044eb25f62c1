"""Series, text, arrays and pictures on the disk, and trees through torch's DataLoader."""

import dataclasses
import json
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from functorch_gen import data, random, tree
from functorch_gen.data import ByteTokenizer, CharTokenizer, TreeDataset
from functorch_gen.train import checkpoint

KEY = random.key(0)
SERIES = {"x": torch.arange(20.0).reshape(10, 2), "t": torch.arange(10)}
TREE = {"image": torch.arange(24, dtype=torch.uint8).reshape(6, 4), "train": {"y": torch.arange(6.0).double()}}


class Pair(NamedTuple):
    left: Any
    right: Any


# Windows.


@pytest.mark.parametrize(("length", "stride", "horizon"), [(3, 1, 1), (4, 2, 3), (1, 1, 2), (9, 5, 1), (2, 3, 8)])
def test_windows_equal_slices(length, stride, horizon):
    inputs, targets = data.windows(SERIES, length, stride=stride, horizon=horizon)
    starts = range(0, 10 - length - horizon + 1, stride)
    for name, x in SERIES.items():
        assert torch.equal(inputs[name], torch.stack([x[i : i + length] for i in starts]))
        assert torch.equal(targets[name], torch.stack([x[i + length : i + length + horizon] for i in starts]))


@pytest.mark.parametrize(("length", "stride", "n"), [(3, 1, 8), (10, 1, 1), (3, 4, 2), (4, 3, 3)])
def test_windows_without_horizon_reach_the_end(length, stride, n):
    found = data.windows(SERIES["t"], length, stride=stride)
    assert torch.equal(found, torch.stack([SERIES["t"][i * stride : i * stride + length] for i in range(n)]))


def test_windows_are_views():
    x = SERIES["x"].clone()
    assert data.windows(x, 4).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda: data.windows(SERIES, 11), ValueError, r"windows: series: expected at least 11 steps at 't', got sha"),
        (lambda: data.windows(SERIES, 8, horizon=3), ValueError, r"at least 11 steps at 't', got shape \(10,\)"),
        (lambda: data.windows(SERIES, 0), ValueError, "windows: expected length > 0, got 0"),
        (lambda: data.windows(SERIES, 2, horizon=0), ValueError, "windows: expected horizon > 0, got 0"),
        (lambda: data.windows({"a": [1]}, 2), TypeError, "windows: series: expected a tensor at 'a.0', got int"),
    ],
    ids=["short", "short for the horizon", "length", "horizon", "leaf"],
)
def test_windows_of_bad_arguments_are_an_error(use, error, message):
    with pytest.raises(error, match=message):
        use()


# Text.


@pytest.mark.parametrize("text", ["", "hello\nworld", "\u00e9\u4e2d\U0001f600 a"])
def test_tokenizers_decode_what_they_encode(text):
    for tokenizer in (CharTokenizer.from_text(text), ByteTokenizer()):
        tokens = tokenizer.encode(text)
        assert tokens.dtype == torch.int64
        assert ((tokens >= 0) & (tokens < tokenizer.vocab_size)).all()
        assert tokenizer.decode(tokens) == text


def test_byte_tokens_are_utf8():
    assert ByteTokenizer().encode("a\u4e2d").tolist() == list("a\u4e2d".encode())
    assert ByteTokenizer().decode(torch.tensor([97, 0xE4])) == "a\ufffd"


def test_char_tokens_are_places_in_the_alphabet():
    tokenizer = CharTokenizer("zya")
    assert tokenizer.encode("yaz").tolist() == [1, 2, 0]
    assert CharTokenizer.from_text("banana").alphabet == "abn"


def test_char_tokenizer_names_unknown_characters_or_replaces_them():
    with pytest.raises(ValueError, match=r"CharTokenizer: expected characters of the alphabet, got '\?', 'x'$"):
        CharTokenizer("ab").encode("ax?x")
    with pytest.raises(ValueError, match=r"and 2 more$"):
        CharTokenizer("ab").encode("0123456789ABab")
    tokenizer = CharTokenizer.from_text("ab", unknown="_")
    assert tokenizer.decode(tokenizer.encode("axb")) == "a_b"


def test_char_tokenizer_is_plain_json(tmp_path):
    tokenizer = CharTokenizer.from_text("\u00e9a\n", unknown="_")
    assert CharTokenizer(**json.loads(json.dumps(dataclasses.asdict(tokenizer)))) == tokenizer
    path = checkpoint.save(tmp_path / "a", {}, metadata={"tokenizer": dataclasses.asdict(tokenizer)})
    assert CharTokenizer(**checkpoint.read_metadata(path)["tokenizer"]) == tokenizer


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: CharTokenizer("aba"), r"CharTokenizer: expected an alphabet of distinct characters, got \['a'\] more"),
        (
            lambda: CharTokenizer("ab", "c"),
            "CharTokenizer: expected unknown to be a character of the alphabet, got 'c'",
        ),
        (lambda: CharTokenizer("ab", ""), "CharTokenizer: expected unknown to be a character of the alphabet, got ''"),
        (
            lambda: CharTokenizer("ab").decode(torch.tensor([0, 2])),
            r"CharTokenizer: expected tokens in \[0, 2\), got 2",
        ),
        (lambda: CharTokenizer("ab").decode(torch.tensor([-1])), r"CharTokenizer: expected tokens in \[0, 2\), got -1"),
        (lambda: ByteTokenizer().decode(torch.tensor([[1]])), r"ByteTokenizer: expected tokens \(n,\), got \(1, 1\)"),
    ],
    ids=["twice", "unknown", "empty unknown", "above", "below", "axes"],
)
def test_tokenizer_of_bad_arguments_is_an_error(use, message):
    with pytest.raises(ValueError, match=message):
        use()


@pytest.mark.parametrize("tokenizer", [CharTokenizer("ab"), ByteTokenizer()], ids=["char", "byte"])
def test_tokenizer_names_what_is_no_text_and_no_token(tokenizer):
    for text, got in ((b"ab", "bytes"), (3, "int")):
        with pytest.raises(TypeError, match=f"Tokenizer: expected text to be a str, got {got}"):
            tokenizer.encode(text)
    for tokens, got in (([1], "list"), (torch.ones(1), r"torch\.float32"), (torch.ones(1).bool(), r"torch\.bool")):
        with pytest.raises(TypeError, match=f"Tokenizer: expected tokens to be a tensor of integers, got {got}"):
            tokenizer.decode(tokens)


# Memory-mapped arrays.

DTYPES = [torch.float64, torch.float32, torch.float16, torch.int64, torch.int8, torch.uint8, torch.uint16, torch.bool]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 2)], ids=str)
def test_arrays_come_back(tmp_path, dtype, shape):
    x = random.normal(KEY, shape, torch.float64).mul(3).to(dtype)
    folder = data.save_arrays(tmp_path / "data", {"x": x})
    found = data.open_arrays(folder)["x"]
    assert found.dtype == dtype
    assert torch.equal(found, x)
    assert np.array_equal(np.load(folder / "x.npy"), x.numpy())


def test_arrays_are_a_tree_by_the_names_of_the_files(tmp_path):
    folder = data.save_arrays(tmp_path / "data", TREE)
    assert sorted(path.name for path in folder.iterdir()) == ["image.npy", "train.y.npy"]
    assert tree.equal(data.open_arrays(folder), TREE)
    assert torch.equal(data.open_arrays(folder / "image.npy"), TREE["image"])
    listed = data.save_arrays(tmp_path / "list", Pair(torch.ones(1), [torch.zeros(2)]))
    assert sorted(tree.names(data.open_arrays(listed))) == ["left", "right.0"]


def test_open_arrays_takes_arrays_of_numpy_in_any_order(tmp_path):
    array = np.arange(12.0).reshape(3, 4)
    np.save(tmp_path / "f.npy", np.asfortranarray(array))
    assert torch.equal(data.open_arrays(tmp_path)["f"], torch.from_numpy(array))


def test_open_arrays_reads_no_more_than_what_is_indexed(tmp_path):
    """A file of 64 GB with a hole: read or mapped with memory of its own, it would not fit."""
    shape = (2**14, 2**19)
    np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.float64, shape)[5, :3] = 7.0
    big = data.open_arrays(tmp_path)["big"]
    assert tuple(big.shape) == shape
    batch = next(data.batches(KEY, {"x": big[:8, :4]}, 8))
    assert batch["x"].sum() == 21.0
    inputs = data.windows(big[:, :2], 3)
    assert inputs[3].sum() == 14.0


def test_open_arrays_leaves_files_as_they_are(tmp_path):
    folder = data.save_arrays(tmp_path / "data", TREE)
    before = (folder / "image.npy").read_bytes()
    for path in folder.iterdir():
        path.chmod(0o444)
    found = data.open_arrays(folder)
    found["image"].zero_()
    assert found["image"].sum() == 0
    assert (folder / "image.npy").read_bytes() == before
    assert tree.equal(data.open_arrays(folder), TREE)


def test_batches_of_memory_mapped_arrays_equal_those_in_memory(tmp_path):
    mapped = data.open_arrays(data.save_arrays(tmp_path / "data", TREE))
    pairs = zip(data.batches(KEY, mapped, 4, steps=3), data.batches(KEY, TREE, 4, steps=3), strict=True)
    assert all(tree.equal(a, b) for a, b in pairs)


def test_create_arrays_are_filled_piece_by_piece(tmp_path):
    with data.create_arrays(tmp_path / "data", tree.to(TREE, "meta")) as arrays:
        assert not (tmp_path / "data").exists()
        for i in range(6):
            tree.map(lambda array, x, i=i: array[i].copy_(x[i]), arrays, TREE)
    assert tree.equal(data.open_arrays(tmp_path / "data"), TREE)


def test_create_arrays_that_fail_leave_nothing(tmp_path):
    def fill():
        with data.create_arrays(tmp_path / "data", TREE) as arrays:
            arrays["image"][7] = 1

    with pytest.raises(IndexError, match="index 7 is out of bounds"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_create_arrays_removes_what_a_killed_process_left(tmp_path):
    (tmp_path / ".data.tmp").mkdir()
    (tmp_path / ".data.tmp" / "old.npy").write_bytes(b"half")
    folder = data.save_arrays(tmp_path / "data", {"x": torch.ones(1)})
    assert [path.name for path in folder.iterdir()] == ["x.npy"]
    assert list(tmp_path.iterdir()) == [folder]


def truncated(folder):
    path = data.save_arrays(folder / "data", {"x": torch.ones(100)}) / "x.npy"
    path.write_bytes(path.read_bytes()[:200])
    return data.open_arrays(path)


def pickled(folder):
    np.save(folder / "x.npy", np.array([{}], dtype=object))
    return data.open_arrays(folder)


def text(folder):
    np.save(folder / "x.npy", np.array(["a"]))
    return data.open_arrays(folder)


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda folder: data.open_arrays(folder / "none"), FileNotFoundError, "none"),
        (lambda folder: data.open_arrays(folder), FileNotFoundError, "expected .npy files in '.*', got none"),
        (truncated, ValueError, "mmap length is greater than file size"),
        (pickled, ValueError, "Python objects"),
        (text, TypeError, r"open_arrays: expected a dtype of torch in '.*x\.npy', got <U1"),
        (lambda folder: data.save_arrays(folder, TREE), FileExistsError, "create_arrays: expected no '.*', got one"),
        (lambda folder: data.save_arrays(folder / "a", {"x": torch.ones(1).bfloat16()}), TypeError, "got torch.bfl"),
        (lambda folder: data.save_arrays(folder / "a", {"x/y": torch.ones(1)}), ValueError, "files, got 'x/y'"),
        (lambda folder: data.save_arrays(folder / "a", torch.ones(1)), ValueError, "names of files, got ''"),
    ],
    ids=["no file", "empty folder", "truncated", "objects", "text", "exists", "bfloat16", "slash", "bare"],
)  # fmt: skip
def test_arrays_of_bad_arguments_are_an_error(tmp_path, use, error, message):
    with pytest.raises(error, match=message):
        use(tmp_path)


# Pictures.


@pytest.fixture
def pictures(tmp_path):
    """Two classes; each picture of one colour, and one gradient."""
    colours = {"b/2.png": (1, 2, 3), "a/1.PNG": (255, 0, 51), "b/deep/0.bmp": (9, 8, 7)}
    for name, colour in colours.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 3), colour).save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "top.png").touch()
    return tmp_path


def test_image_folder_lists_classes_and_files_in_order(pictures):
    dataset = data.image_folder(pictures, (3, 5))
    assert dataset.classes == ("a", "b")
    assert len(dataset) == 3
    assert [int(dataset[i]["label"]) for i in range(3)] == [0, 1, 1]
    assert [dataset[i]["image"][:, 0, 0].tolist() for i in range(3)] == [[255, 0, 51], [1, 2, 3], [9, 8, 7]]
    assert dataset[0]["image"].shape == (3, 3, 5)


def test_image_folder_keeps_pixels_where_nothing_is_resized(pictures):
    pixels = torch.arange(60, dtype=torch.uint8).reshape(4, 5, 3)
    Image.fromarray(pixels.numpy()).save(pictures / "a" / "0.png")
    assert torch.equal(data.image_folder(pictures, (4, 5))[0]["image"], pixels.permute(2, 0, 1))


def test_image_folder_resizes_as_pillow_and_scales_floats(pictures):
    pixels = torch.arange(0, 240, 4, dtype=torch.uint8).reshape(4, 5, 3)
    picture = Image.fromarray(pixels.numpy())
    picture.save(pictures / "a" / "0.png")
    want = torch.from_numpy(np.array(picture.resize((7, 2), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    assert torch.equal(data.image_folder(pictures, (2, 7))[0]["image"], want)
    assert torch.equal(data.image_folder(pictures, (2, 7), dtype=torch.float64)[0]["image"], want.double() / 255)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_image_folder_converts_channels(pictures, channels):
    assert data.image_folder(pictures, (2, 2), channels=channels)[0]["image"].shape == (channels, 2, 2)


def test_image_folder_of_bad_arguments_is_an_error(pictures, tmp_path, monkeypatch):
    for use, error, message in (
        (lambda: data.image_folder(pictures / "a", (2, 2)), FileNotFoundError, "expected pictures in folders of"),
        (lambda: data.image_folder(pictures / "x", (2, 2)), FileNotFoundError, "x"),
        (lambda: data.image_folder(pictures, (0, 2)), ValueError, "image_folder: expected height > 0, got 0"),
        (lambda: data.image_folder(pictures, (2, 2), channels=2), ValueError, "channels to be one of 1, 3, 4"),
        (lambda: data.image_folder(pictures, (2, 2), dtype=torch.int64), ValueError, "expected dtype uint8"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            use()
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"needs Pillow: pip install functorch_gen\[plot\]"):
        data.image_folder(pictures, (2, 2))


# DataLoader.


def test_collate_stacks_every_kind_of_leaf():
    examples = [
        Pair({"x": torch.full((2,), i), "n": None}, [i, 0.5 * i, i > 0, f"name {i}", np.float32(i), (np.arange(2),)])
        for i in range(3)
    ]
    found = data.collate(examples)
    assert tree.structure(found.left) == tree.structure({"x": 0, "n": None})
    assert torch.equal(found.left["x"], torch.tensor([[0, 0], [1, 1], [2, 2]]))
    ints, floats, bools, names, scalars, (arrays,) = found.right
    assert [x.dtype for x in (ints, floats, bools, scalars)] == [torch.int64, torch.float32, torch.bool, torch.float32]
    assert (ints.tolist(), floats.tolist(), bools.tolist()) == ([0, 1, 2], [0.0, 0.5, 1.0], [False, True, True])
    assert names == ["name 0", "name 1", "name 2"]
    assert arrays.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize(
    ("examples", "error", "message"),
    [
        ([], ValueError, "collate: expected at least one example, got none"),
        (
            [{"a": torch.ones(2)}, {"a": torch.ones(3)}],
            ValueError,
            r"collate: expected shape \(2,\) at 'a', got \(3,\)",
        ),
        ([{"a": 1}, {"b": 1}], ValueError, "expected a leaf at 'a' in every tree"),
        ([{"a": object()}], TypeError, "collate: expected tensors, numbers or strings at 'a', got object"),
    ],
    ids=["none", "shapes", "structures", "leaf"],
)
def test_collate_of_bad_examples_is_an_error(examples, error, message):
    with pytest.raises(error, match=message):
        data.collate(examples)


def test_tree_dataset_goes_through_a_loader_of_torch():
    found = list(DataLoader(TreeDataset(TREE), batch_size=4, collate_fn=data.collate))
    assert tree.equal(tree.map(lambda *parts: torch.cat(parts), *found), TREE)


def noisy(key, example):
    return {**example, "noise": random.normal(key, (2,))}


def test_loader_gives_the_batches_of_the_key():
    loaded = data.loader(KEY, TreeDataset(TREE), 4, steps=5)
    assert all(tree.equal(a, b) for a, b in zip(loaded, data.batches(KEY, TREE, 4, steps=5), strict=True))


def test_loader_folds_epoch_and_index_into_the_key():
    dataset = TreeDataset({"i": torch.arange(6)})
    drawn = {}
    for step, batch in enumerate(data.loader(KEY, dataset, 3, transform=noisy, steps=6)):
        for i, noise in zip(batch["i"].tolist(), batch["noise"], strict=True):
            key = random.fold_in(random.fold_in(random.fold_in(KEY, -1), step // 2), i)
            assert torch.equal(noise, random.normal(key, (2,)))
            drawn[step // 2, i] = tuple(noise.tolist())
    assert len(set(drawn.values())) == 18


def test_loader_resumes_at_any_step_and_starts_anew_each_time():
    dataset = TreeDataset(TREE)
    loaded = data.loader(KEY, dataset, 4, transform=noisy, steps=5)
    whole = list(loaded)
    rest = list(data.loader(KEY, dataset, 4, transform=noisy, steps=2, start=3))
    assert all(tree.equal(a, b) for a, b in zip(whole[3:], rest, strict=True))
    assert all(tree.equal(a, b) for a, b in zip(whole, loaded, strict=True))


def test_loader_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    next(iter(data.loader(KEY, TreeDataset(TREE), 4, transform=noisy)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [1, 2])
def test_loader_gives_the_same_batches_with_workers(workers):
    options: dict[str, Any] = {"transform": noisy, "steps": 6}
    want = list(data.loader(KEY, TreeDataset(TREE), 4, **options))
    found = list(data.loader(KEY, TreeDataset(TREE), 4, num_workers=workers, **options))
    assert all(tree.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize(
    ("batch_size", "options", "message"),
    [(7, {}, "expected batch_size <= 6"), (2, {"steps": 0}, "expected steps > 0"), (2, {"start": -1}, "a step >= 0")],
)
def test_loader_of_bad_arguments_fails_at_the_call(batch_size, options, message):
    with pytest.raises(ValueError, match=message):
        data.loader(KEY, TreeDataset(TREE), batch_size, **options)


def test_tree_dataset_of_unequal_leaves_is_an_error():
    with pytest.raises(ValueError, match=r"TreeDataset: data: expected shape \(6, ...\) at 'z', got \(2,\)"):
        TreeDataset({"a": torch.zeros(6), "z": torch.zeros(2)})
