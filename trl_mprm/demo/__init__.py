"""The miniature: a small world of pictures and questions, a base model and a trained process reward model, both in the package."""

from pathlib import Path


# A trained process reward model of one million parameters, and a picture to try it on.
MINIATURE = Path(__file__).parent / "miniature-prm"
EXAMPLE = Path(__file__).parent / "example.png"
