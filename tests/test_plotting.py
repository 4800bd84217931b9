"""Pictures come in a light and a dark version, in colours that colour-blind readers tell apart."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from trl_mprm.plotting import DARK, LIGHT, SUBSETS, save_light_and_dark


def linear(colour: str) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Björn Ottosson, "A perceptual color space for image processing", 2020."""
    cones = np.array([[0.4122215, 0.5363325, 0.0514460], [0.2119035, 0.6806995, 0.1073970],
                      [0.0883025, 0.2817188, 0.6299787]])  # fmt: skip
    mixed = np.array([[0.2104543, 0.7936178, -0.0040720], [1.9779985, -2.4285922, 0.4505937],
                      [0.0259040, 0.7827718, -0.8086758]])  # fmt: skip
    return mixed @ np.cbrt(cones @ rgb.clip(0, 1))


# Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision deficiency", 2009.
VISION = {
    "usual": np.eye(3),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.011820, 0.042940, 0.968881]]),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
}  # fmt: skip


def distance(one: str, two: str, vision: str) -> float:
    """Distance in OKLab; 0.02 is about what is just noticed."""
    return float(np.linalg.norm(oklab(VISION[vision] @ linear(one)) - oklab(VISION[vision] @ linear(two))))


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
