"""Finds the pictures of rollouts and benchmarks: inside one folder, whole, and not too large."""

import io
import os
import warnings
from pathlib import Path

from PIL import Image


MAX_PIXELS = 89_478_485  # Pillow's own line between a large picture and a decompression bomb


class ImageRefused(Exception):
    """Why a picture cannot be used: `reason` is one of `image_not_a_path`, `_missing`, `_outside_root`, `_unreadable`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class ImageFinder:
    """
    Finds and checks the images below one root, each path once.

    Args:
        root (`Path`, *optional*):
            Folder that paths are relative to and must stay in, links followed. Without it no path is found.
        check (`bool`, *optional*, defaults to `True`):
            Look for the file, and check header, size and end mark. Otherwise paths are taken as they are.
    """

    def __init__(self, root: str | os.PathLike | None, check: bool = True):
        self.root = None if root is None else os.path.realpath(root)
        self.check = check
        self.found: dict[str, str | ImageRefused] = {}

    def find(self, name: object) -> str:
        """Return the path of the image `name`. Raises [`ImageRefused`]."""
        if not isinstance(name, str) or not name:
            raise ImageRefused("image_not_a_path", f"image is {name!r:.80}, expected a path")
        if not self.check:
            return name
        if name not in self.found:
            self.found[name] = self._look(name)
        found = self.found[name]
        if isinstance(found, ImageRefused):
            raise found
        return found

    def _look(self, name: str) -> str | ImageRefused:
        if self.root is None:
            return ImageRefused("image_missing", f"{name!r:.80}: no image root was given")
        refused = ImageRefused("image_missing", f"{name!r:.80} is not in {self.root}")
        # The annotations say VisualPRM400K-v1.1-Raw/<x>, and images.zip unpacks to images/<x>. Short paths of NLVR2
        # (images/train-*.png) lie in images/nlvr2/.
        short = name.removeprefix("VisualPRM400K-v1.1-Raw/")
        for candidate in dict.fromkeys([name, short, f"images/{short}", f"images/nlvr2/{short}"]):
            try:
                real = os.path.realpath(os.path.join(self.root, candidate))
                if not Path(real).is_relative_to(self.root):
                    refused = ImageRefused("image_outside_root", f"{name!r:.80} leads out of {self.root}")
                elif os.path.isfile(real):
                    with open(real, "rb") as file:
                        check_image(file)
                    return real
            except ImageRefused as error:
                return ImageRefused(error.reason, f"{name!r:.80}: {error}")
            except PermissionError as error:
                return ImageRefused("image_unreadable", str(error))
            except (
                OSError,
                ValueError,
            ):  # a name that no file can have: too long, with a zero byte or a lone surrogate
                continue
        return refused


def check_image(file: io.BufferedIOBase) -> None:
    """
    Raise [`ImageRefused`] unless `file` is a whole picture of at most `MAX_PIXELS` pixels.

    Header and end mark are checked; only a format without end mark, or a file that lacks it, is decoded.

    Examples:
    ```python
    >>> import io
    >>> from trl_mprm.images import ImageRefused, check_image
    >>> try:
    ...     check_image(io.BytesIO(b"no picture"))
    ... except ImageRefused as refused:
    ...     print(refused.reason)
    image_unreadable

    ```
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
        too_large = image.width * image.height > MAX_PIXELS
        file.seek(max(file.seek(0, os.SEEK_END) - 64, 0))
        end = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}.get(image.format)
        if not too_large and (end is None or end not in file.read()):
            file.seek(0)
            Image.open(file).load()
    except (
        Exception
    ) as error:  # a broken file can raise anything in a decoder: OSError, SyntaxError, struct.error, ...
        raise ImageRefused("image_unreadable", f"not a whole picture ({error})") from error
    if too_large:
        raise ImageRefused("image_unreadable", f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
