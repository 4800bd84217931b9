"""The sources from which a server accepts pictures, and the limits on requests."""

import base64
import io
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import requests
from PIL import Image

from ..data.images import ImageFinder, check_image
from ..data.rows import Refused


@dataclass(frozen=True)
class Limits:
    """
    The limits on what a client may send.

    Attributes:
        body_bytes (`int`): Bytes per request.
        body_seconds (`float`): Seconds in which a whole request must arrive.
        images (`int`): Images per question.
        image_pixels (`int`): Pixels per picture.
        tokens (`int`): Tokens per solution, question and steps together, without those of pictures.
        candidates (`int`): Candidates per question.
        waiting (`int`): Solutions that may wait for the model.
    """

    body_bytes: int = 2**25
    body_seconds: float = 30.0
    images: int = 8
    image_pixels: int = 2**24
    tokens: int = 16384
    candidates: int = 256
    waiting: int = 1024


@dataclass
class Pictures:
    """Opens pictures from data URLs, from files in `root`, and from the hosts in `hosts`."""

    limits: Limits
    root: str | None = None
    hosts: tuple[str, ...] = ()
    finder: ImageFinder = field(init=False)

    def __post_init__(self):
        self.finder = ImageFinder(self.root)

    def open(self, name: str) -> dict[str, Any]:
        """Return a picture in the form that rows hold. Raises `ValueError` with one sentence that reveals nothing about this machine."""
        if name.startswith("data:"):
            data = self._inline(name)
        elif urlsplit(name).scheme in ("http", "https"):
            data = self._fetched(name)
        elif self.root is None:
            raise ValueError(
                "expected an image as a data URL (data:image/png;base64,...): this server has no image root"
            )
        else:
            try:
                found = self.finder.find(name)
            except Refused as refused:
                raise ValueError(
                    f"an image cannot be used ({refused.reason}): name a whole picture in the image root"
                ) from None
            with open(found, "rb") as file:
                data = file.read()
        self._check(data)
        return {"bytes": data, "path": None}

    def _inline(self, url: str) -> bytes:
        head, comma, text = url.partition(",")
        if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
            raise ValueError(f"a data URL begins {url[:40]!r}, expected data:image/png;base64,...")
        try:
            return base64.b64decode(text, validate=True)
        except ValueError:
            raise ValueError("the data of an image is not valid base64") from None

    def _fetched(self, url: str) -> bytes:
        host = urlsplit(url).hostname
        if host not in self.hosts:
            raise ValueError(
                f"images are not fetched from {host}: send a data URL, or start with --allow-image-host {host}"
            )
        try:
            with requests.get(url, stream=True, timeout=10, allow_redirects=False) as answer:
                data = answer.raw.read(self.limits.body_bytes + 1, decode_content=True)
                if answer.status_code != 200 or len(data) > self.limits.body_bytes:
                    raise ValueError(
                        f"{host} answered {answer.status_code} with {len(data)} bytes, expected a picture"
                    )
                return data
        except requests.RequestException as error:
            raise ValueError(f"{host} cannot be reached ({type(error).__name__})") from None

    def _check(self, data: bytes) -> None:
        try:
            check_image(io.BytesIO(data))
        except Refused as refused:
            raise ValueError(f"an image is {refused}") from None
        width, height = Image.open(io.BytesIO(data)).size
        if width * height > self.limits.image_pixels:
            raise ValueError(f"an image has {width} x {height} pixels, at most {self.limits.image_pixels:,} are read")
