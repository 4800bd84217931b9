"""Pictures come in a light and a dark version, in colours that colour-blind readers tell apart."""

from itertools import combinations

import pytest
from colour_vision import VISION, distance
from PIL import Image

from trl_mprm.plotting import DARK, LIGHT, SUBSETS, save_light_and_dark


def colours(style: dict) -> list[str]:
    return style["axes.prop_cycle"].by_key()["color"]


def test_both_versions_are_written_each_in_its_style(tmp_path):
    def draw(figure):
        axes = figure.subplots()
        axes.bar([0], [1], color=SUBSETS["bis"]["color"])

    light, dark = save_light_and_dark(draw, tmp_path / "deep" / "f1.png", size=(2, 1), dpi=100)
    assert (light.name, dark.name) == ("f1.png", "f1-dark.png")
    for path, style in ((light, LIGHT), (dark, DARK)):
        picture = Image.open(path).convert("RGB")
        assert picture.size == (200, 100)
        shown = {"#{:02x}{:02x}{:02x}".format(*pixel) for pixel in picture.get_flattened_data()}
        assert {style["figure.facecolor"], colours(style)[0]} <= shown


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("style", [LIGHT, DARK], ids=["light", "dark"])
def test_subsets_can_be_told_apart(style, vision):
    shown = {name: colours(style)[int(look["color"][1:])] for name, look in SUBSETS.items()}
    for one, two in combinations(shown, 2):
        assert distance(shown[one], shown[two], vision) > 0.08, (one, two)
    for colour in colours(style):
        assert distance(colour, style["figure.facecolor"], vision) > 0.2
    assert len({look["marker"] for look in SUBSETS.values()}) == len(SUBSETS)


def test_green_and_red_would_not_pass():
    assert distance("#2a9d55", "#d1495b", "deuteranopia") < 0.08 < distance("#2a9d55", "#d1495b", "usual")
