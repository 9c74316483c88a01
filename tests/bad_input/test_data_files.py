"""Data and weights that are not there, are something else, or lie about what they hold."""

import json
import os
import pathlib
import pickle
import struct
import zlib

import pytest
from bad_inputs import Bad, bad

NOT_A_FILE = {
    "fifo": (os.mkfifo, "It is a pipe"),
    "folder": (pathlib.Path.mkdir, "Is a directory"),
    "broken link": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "link to itself": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "nothing": (lambda path: None, "No such file"),
}


def token_file(
    ids=bytes(2000), magic=b"LAUNCHTK", version=1, width=1, number=None, vocab=256, checksum=None
) -> bytes:
    number = len(ids) // width if number is None else number
    header = struct.pack("<8sIIQQ28x", magic, version, width, number, vocab)
    checksum = zlib.crc32(header) if checksum is None else checksum
    return header + struct.pack("<I", checksum) + ids


def tokens(contents: bytes, says: str, name: str) -> Bad:
    arguments = ("data=tokens", "data.path=t.tok")
    return bad(*arguments, files={"t.tok": contents}, says=says, name=f"tokens {name}")


CONVERT, DAMAGED = "convert it again", "t.tok is damaged ... convert it again"
TOKENS = [
    tokens(b"", "t.tok is no token file ... make one with", "empty"),
    tokens(token_file(magic=b"LAUNCHTX"), "t.tok is no token file ... make one with", "magic"),
    tokens(token_file()[:30], "t.tok ends after 30 bytes ... copy or convert", "half a header"),
    tokens(token_file()[:-1], "has 2063 bytes ... copy or convert it again", "cut short"),
    tokens(token_file() + b"x", "has 2065 bytes ... copy or convert it again", "added to"),
    tokens(token_file(version=9), "has version 9 ... " + CONVERT, "version"),
    tokens(token_file(checksum=1), DAMAGED, "checksum"),
    tokens(token_file(width=3), "has 3 bytes per id ... " + CONVERT, "width"),
    tokens(token_file(number=2**64 - 1), "promises 18446744073709551679 ... copy or", "number"),
    tokens(token_file(width=4, number=2**62), "promises 18446744073709551680 ... copy", "overflow"),
    tokens(token_file(vocab=0), "a vocabulary of 0 ... " + CONVERT, "no vocabulary"),
    tokens(token_file(vocab=2**63), "a vocabulary of 9223372036854775808 ... " + CONVERT, "vast"),
    tokens(token_file(vocab=257), "for 257 tokens ... give model.vocab_size=257 or more", "large"),
    tokens(
        token_file(b"\xff" * 2000, vocab=10), "t.tok holds the token 255 ... " + CONVERT, "beyond"
    ),
    tokens(token_file(bytes(50)), "data.path=t.tok gives 50 tokens ... give more text", "few"),
    tokens(b"Once upon a time", "t.tok is no token file ... or take data=text for text", "a text"),
    bad("data=tokens", says="data.path=null: make one with ... and give data.path=FILE"),
]

ELSEWHERE = [
    bad("data=tokens", "data.path=t", make=lambda folder, make=make: make(folder / "t"),
        says=f"{why} ... correct data.path", name=f"tokens: {name}")
    for name, (make, why) in NOT_A_FILE.items()
] + [
    bad("model.weights=t", make=lambda folder, make=make: make(folder / "t"),
        says=f"model.weights=t ... {why} ... give a safetensors file", name=f"weights: {name}")
    for name, (make, why) in NOT_A_FILE.items()
] + [
    bad("data.path=t", make=lambda folder, make=make: make(folder / "t"),
        says="data.path=t is no file, no folder with files ... correct the path", name=f"text: {name}")
    for name, (make, _) in NOT_A_FILE.items()
]  # fmt: skip


def sparse(folder: pathlib.Path) -> None:
    with (folder / "t.txt").open("wb") as file:
        file.truncate(2**40)


TEXTS = [
    bad("data.path=t.txt", files={"t.txt": contents}, says=says, name=f"text: {name}")
    for name, contents, says in (
        ("empty", "", "data=text (t.txt) gives 0 tokens ... give more text"),
        ("one word", "hello", "gives 5 tokens ... give more text, or a smaller model.seq_len"),
        ("binary", bytes(range(256)), "t.txt is not UTF-8 ... leave it out with a glob"),
        ("utf-16", "hello".encode("utf-16"), "t.txt is not UTF-8 ... leave it out with a glob"),
    )
] + [
    bad("data.path=t.txt", make=sparse, says="has 1099511627776 bytes ... and take data=tokens"),
    bad("data.path='~nobody_here/t'", says="data.path=~nobody_here/t ... correct the path"),
    bad("data.path='[z-'", says="data.path=[z- is no file ... correct the path"),
]

IMAGES = ("model=wrn", "data=images", "data.path=i")
TWO = {"i/a/x.png": "x", "i/a/y.png": "y"}
PICTURES = [
    bad(*IMAGES, says="data.path=i is no folder ... correct data.path"),
    bad(*IMAGES, files={"i": "x"}, says="data.path=i is no folder ... correct data.path"),
    bad(*IMAGES, make=lambda f: (f / "i").mkdir(), says="is no folder with a folder ... correct"),
    bad(*IMAGES, files={"i/a/x.txt": "x"}, says="i/a has no images ... fill it or remove it"),
    bad(*IMAGES, files={"i/a/x.png": "x"}, says="one each ... give two images or more"),
    bad(*IMAGES, files=TWO, says="cannot read the image i/a/x.png ... remove it from data.path"),
    bad(*IMAGES, files={"i/a/z.png": ""}, make=lambda f: os.mkfifo(f / "i/a/y.png"),
        says="cannot read the image i/a/y.png: ... remove it from data.path"),
    bad(*IMAGES, files={f"i/{k}/{j}.png": "" for k in range(12) for j in "ab"},
        says="data=images has 12 classes ... give model.num_classes=12 or more"),
    bad("model=wrn", "data=images", says="data.path=null: give data.path=<a folder"),
]  # fmt: skip

ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
WHOLE = "is no whole safetensors file ... copy or export it again"


def weights_file(header: object, data: bytes = bytes(4), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def weights(contents: bytes, name: str, says: str = WHOLE) -> Bad:
    arguments, files = ("model.weights=w.st",), {"w.st": contents}
    return bad(*arguments, files=files, says=f"model.weights=w.st {says}", name=f"weights {name}")


def entry(**fields: object) -> bytes:
    return weights_file({"a": {**ENTRY, **fields}})


WEIGHTS = [
    weights(b"", "empty"),
    weights(weights_file(b"{}", length=2**63), "of a vast header"),
    weights(weights_file(b"hello"), "without JSON"),
    weights(weights_file([1]), "of a list"),
    weights(weights_file(None), "of nothing"),
    weights(weights_file(b"[" * 100_000), "deep"),
    weights(weights_file(b'{"a": ' + b"9" * 5000 + b"}"), "of 5000 digits"),
    weights(weights_file({"a": 3}), "of a number"),
    weights(weights_file({"a": ENTRY, "b": ENTRY}, bytes(8)), "that overlap"),
    weights(weights_file({"a": {**ENTRY, "data_offsets": [4, 8]}}, bytes(8)), "with a gap"),
    weights(weights_file({"a": ENTRY}, bytes(3)), "cut short"),
    weights(entry(data_offsets=[-4, 0]), "at a negative place"),
    weights(entry(data_offsets=[0, 10**30]), "at a vast place"),
    weights(entry(data_offsets=[0, 4, 8]), "at three places"),
    weights(entry(shape=[-1, -1]), "of a negative shape"),
    weights(entry(shape=[1.5]), "of half a shape"),
    weights(entry(shape="1"), "of a text's shape"),
    weights(entry(shape=[1] * 100), "of 100 dims"),
    weights(entry(dtype="F99"), "of an unknown dtype"),
    weights(entry(dtype=[]), "of a list's dtype"),
    weights(weights_file(b'{"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]}}'), "inf"),
    weights(weights_file({"__metadata__": "xx", "a": ENTRY}), "of metadata that are a text"),
    weights(pickle.dumps({"a": 1}), "pickled"),
    weights(weights_file({"a": ENTRY}), "of another model", "lacks 52 ... give the model"),
    weights(
        weights_file({"__metadata__": {"model": "\u202e", "size": 3}, "a": ENTRY}),
        "of odd metadata", "lacks 52 ... give the model",
    ),
]  # fmt: skip

CASES = [*TOKENS, *ELSEWHERE, *TEXTS, *PICTURES, *WEIGHTS]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_data_or_weights_are_refused(case, refuse):
    refuse(case)
