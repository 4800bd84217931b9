import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for color in ("red", "blue"):
        Image.new("RGB", (8, 8), color).save(tmp_path / "images" / f"{color}.png")
    return tmp_path
