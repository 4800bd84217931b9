"""The quick look at a picture's header takes only what Pillow takes, and reads the size that Pillow reads."""

import io
import os
import random

import pytest
from PIL import Image, PngImagePlugin

from trl_mprm.data.image_header import HEAD, ordinary_size
from trl_mprm.data.images import ImageFinder
from trl_mprm.data.rows import Refused


def saved(form, mode="RGB", size=(30, 20), **options):
    Image.new(mode, size).save(file := io.BytesIO(), form, **options)
    return file.getvalue()


def described():
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", "any")
    return info


ORDINARY = {
    "png": saved("PNG"),
    "png, grey": saved("PNG", "L"),
    "png, resolution": saved("PNG", "RGBA", dpi=(72, 72)),
    "jpeg": saved("JPEG"),
    "jpeg, grey": saved("JPEG", "L"),
    "jpeg, progressive": saved("JPEG", progressive=True, quality=95),
}
OTHERS = {
    "png, text": saved("PNG", pnginfo=described()),
    "png, palette": saved("PNG", "P"),
    "jpeg, exif": saved("JPEG", exif=Image.Exif().tobytes()),
    "jpeg, four colours": saved("JPEG", "CMYK"),
    "gif": saved("GIF"),
    "webp": saved("WEBP"),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_pictures_are_known(name):
    assert ordinary_size(ORDINARY[name][:HEAD]) == (30, 20)


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left_to_pillow(name):
    assert ordinary_size(OTHERS[name][:HEAD]) is None


@pytest.mark.parametrize("name", ORDINARY)
def test_what_is_known_is_what_pillow_reads(name):
    """With one to three bytes of the header changed, or the file cut short: known means that Pillow opens it too."""
    rng, known, unknown = random.Random(name), 0, 0
    for _ in range(1500):
        data = bytearray(ORDINARY[name])
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(min(len(data), 700))] = rng.choice((0, 1, 3, 8, 255, rng.randrange(256)))
        data = bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))])
        size = ordinary_size(data[:HEAD])
        if size is None:
            unknown += 1
            continue
        known += 1
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == size and image.format == name.split(",")[0].upper()
    assert unknown and known if name.startswith("jpeg") else unknown


def test_a_picture_that_is_no_file_keeps_nobody_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    finder = ImageFinder(tmp_path)
    for name in ("pipe.png", "folder.png", "none.png"):
        found = finder.look(name)
        assert isinstance(found, Refused) and found.reason == "image_missing"


def test_the_end_of_an_ordinary_picture_is_looked_at(tmp_path):
    for name in ("png", "jpeg"):
        data = saved(name.upper(), size=(300, 200))
        (tmp_path / f"whole.{name}").write_bytes(data)
        (tmp_path / f"cut.{name}").write_bytes(data[:-100])
        assert ImageFinder(tmp_path).look(f"whole.{name}") == str(tmp_path / f"whole.{name}")
        assert ImageFinder(tmp_path).look(f"cut.{name}").reason == "image_unreadable"
