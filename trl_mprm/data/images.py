"""Find the pictures of rollouts and benchmarks, which must be inside one folder, whole, and not too large."""

import base64
import errno
import io
import os
import stat
import warnings
from typing import TYPE_CHECKING, Any

from .image_header import HEAD, ordinary_size
from .rows import Reason, Refused, image_list, is_unicode


if TYPE_CHECKING:  # Pillow is imported when a picture is opened: annotations often come without their pictures
    from PIL import Image


MAX_PIXELS = 89_478_485  # Pillow's own line between a large picture and a decompression bomb

REMEMBERED = 20_000  # images that a finder has looked at, so that it need not look again


class ImageFinder:
    """
    Finds and checks the images below one root.

    Args:
        root (`Path`, *optional*):
            Folder that paths are relative to and must stay in, links followed. Without it no path is found.
        check (`bool`, *optional*, defaults to `True`):
            Look for the file, and check header, size and end mark. Otherwise paths are taken unchecked.
    """

    def __init__(self, root: str | os.PathLike | None, check: bool = True):
        self.root = None if root is None else os.path.realpath(root)
        self.check = check
        self.found: dict[str, str | Refused] = {}
        self.folders: dict[str, list[tuple[str, bool, bool]]] = {}

    def find(self, image: object) -> str | bytes:
        """Like [`~ImageFinder.look`], but raises the [`Refused`]."""
        found = self.look(image)
        if isinstance(found, Refused):
            raise Refused(found.reason, str(found))  # a new one: it is shared by all images of its folder
        return found

    def look(self, image: object) -> str | bytes | Refused:
        """
        The path of an image, or its bytes if the record has them (`{"bytes": ..., "path": ...}`, in JSON as base64), or the
        fault.
        """
        if isinstance(image, bytes):
            image = {"bytes": image}
        if isinstance(image, dict):
            data = image.get("bytes")
            try:
                if isinstance(data, str):
                    data = base64.b64decode(data, validate=True)
                if isinstance(data, bytes):
                    check_image(io.BytesIO(data))
                    return data
            except Refused as refused:
                return refused
            except ValueError as error:  # of base64
                return Refused(Reason.IMAGE_UNREADABLE, f"bytes of an image are no base64 ({error})")
            image = image.get("path")
        if not isinstance(image, str) or not image or not (image.isascii() or is_unicode(image)):
            return Refused(Reason.IMAGE_NOT_A_PATH, f"image is {image!r:.80}, expected a path")
        if not self.check:
            return image
        if (found := self.found.get(image)) is not None:
            return found
        found = self._look(image)
        # A missing image costs one look at its folder; a present one is read, so it is remembered, up to a limit.
        if isinstance(found, str) or found.reason != Reason.IMAGE_MISSING:
            if len(self.found) >= REMEMBERED:
                self.found.clear()
            self.found[image] = found
        return found

    def lacks(self, folder: str) -> bool:
        """Whether a folder, with its slash, is known not to be there: all images in it are missing."""
        return isinstance(self.folders.get(folder), Refused)

    def _look(self, name: str) -> str | Refused:
        if self.root is None:
            return Refused(Reason.IMAGE_MISSING, f"{name!r:.80}: no image root was given")
        folder, slash, base = name.rpartition("/")
        if base in ("", ".", ".."):
            folder, slash, base = name, "/", "."
        if (folders := self.folders.get(folder + slash)) is None:
            folders = self.folders[folder + slash] = self._candidates(folder + slash)
        if isinstance(folders, Refused):
            return folders
        refused = None
        for path, inside, exists in folders:
            real, link = path + base, not inside
            try:
                if exists and inside:
                    try:
                        if check_file(real, os.O_NOFOLLOW):
                            return real
                    except OSError as error:
                        if error.errno != errno.ELOOP:
                            raise
                        link = True
                if exists and link:
                    real = os.path.realpath(real)
                    inside = self._inside(real)
                    if inside and check_file(real):
                        return real
                if not inside:
                    refused = Refused(Reason.IMAGE_OUTSIDE_ROOT, f"{name!r:.80} leads out of {self.root}")
            except Refused as error:
                return Refused(error.reason, f"{name!r:.80}: {error}")
            except PermissionError as error:
                return Refused(Reason.IMAGE_UNREADABLE, str(error))
            except (OSError, ValueError):  # not there, or a name that no file can have
                if not inside:
                    refused = Refused(Reason.IMAGE_OUTSIDE_ROOT, f"{name!r:.80} leads out of {self.root}")
        return refused or Refused(Reason.IMAGE_MISSING, f"{name!r:.80} is not in {self.root}")

    def _candidates(self, folder: str) -> list[tuple[str, bool, bool]] | Refused:
        """The folders in which the files may be: real path with a slash, whether it is inside the root, and exists."""
        # The annotations say VisualPRM400K-v1.1-Raw/<x>, and images.zip unpacks to images/<x>. Short paths of NLVR2
        # (images/train-*.png) lie in images/nlvr2/.
        short = folder.removeprefix("VisualPRM400K-v1.1-Raw/")
        found = []
        for name in dict.fromkeys([folder, short, f"images/{short}", f"images/nlvr2/{short}"]):
            try:
                path = os.path.join(os.path.realpath(os.path.join(self.root, name)), "")
                found.append((path, self._inside(path), os.path.isdir(path)))
            except (OSError, ValueError):  # a name that no folder can have: a zero byte, a lone surrogate
                continue
        if any(exists or not inside for _, inside, exists in found):
            return found
        return Refused(Reason.IMAGE_MISSING, f"{folder!r:.80} is not in {self.root}")

    def _inside(self, path: str) -> bool:
        return path.startswith(os.path.join(self.root, ""))


def find_images(record: dict, finder: ImageFinder, keep_missing: bool = False) -> list[dict]:
    """
    The images of a record as [`~datasets.Image`] stores them: a path, or bytes. Raises [`Refused`].

    With `keep_missing`, missing images are returned as the paths where they would be, below the root.
    """
    images = image_list(record)
    found = [finder.look(image) for image in images]
    fault = next((each for each in found if isinstance(each, Refused)), None)
    if fault is not None and keep_missing and fault.reason == Reason.IMAGE_MISSING:
        found = [ImageFinder(None, check=False).find(image) for image in images]
        found = [os.path.join(finder.root or "", each) if isinstance(each, str) else each for each in found]
    elif fault is not None:
        raise Refused(fault.reason, fault.detail)  # a new one: the finder hands it out again
    return [
        {"path": each, "bytes": None} if isinstance(each, str) else {"path": None, "bytes": each} for each in found
    ]


def check_file(path: str, flags: int = 0) -> bool:
    """Whether there is a file under a path. Raises [`Refused`] unless it is a whole picture, and `OSError`."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)  # a pipe would keep us waiting
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            return False
        if not _is_ordinary(os.pread(handle, HEAD, 0), os.pread(handle, 64, max(state.st_size - 64, 0))):
            with open(handle, "rb", closefd=False) as file:
                check_image(file)
        return True
    finally:
        os.close(handle)


def _is_ordinary(head: bytes, tail: bytes) -> bool:
    """Whether a picture is known to pass [`check_image`] by its first bytes and its last 64."""
    size = ordinary_size(head)
    return size is not None and size[0] * size[1] <= MAX_PIXELS and END_MARKS[head[1:4] == b"PNG"] in tail


END_MARKS = b"\xff\xd9", b"IEND"  # of a JPEG, of a PNG


def check_image(file: io.BufferedIOBase) -> None:
    """
    Raise [`Refused`] unless `file` is a whole picture of at most `MAX_PIXELS` pixels.

    Header and end mark are checked; only a format without end mark, or a file that lacks it, is decoded.

    Examples:
    ```python
    >>> import io
    >>> from trl_mprm.data.images import check_image
    >>> from trl_mprm.data.rows import Refused
    >>> try:
    ...     check_image(io.BytesIO(b"no picture"))
    ... except Refused as refused:
    ...     print(refused.reason)
    image_unreadable

    ```
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file)
        too_large = image.width * image.height > MAX_PIXELS
        file.seek(max(file.seek(0, os.SEEK_END) - 64, 0))
        end = dict(zip(("JPEG", "PNG"), END_MARKS, strict=True)).get(image.format)
        if not too_large and (end is None or end not in file.read()):
            file.seek(0)
            Image.open(file).load()
    except (
        Exception
    ) as error:  # a broken file can raise anything in a decoder: OSError, SyntaxError, struct.error, ...
        raise Refused(Reason.IMAGE_UNREADABLE, f"not a whole picture ({error})") from error
    if too_large:
        raise Refused(Reason.IMAGE_UNREADABLE, f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")


def open_image(image: "Image.Image | str | os.PathLike | dict[str, Any]") -> "Image.Image":
    """
    Convert an image to RGB, or open a path or the value of an undecoded column (`{"bytes", "path"}`).

    An image is rotated according to its EXIF orientation, as `datasets` does when it decodes a column. Transparent areas
    become white, since plain conversion would make a drawing of black lines on a transparent ground all black.

    Raises `ValueError` if there is no image, or the file is not a whole image.
    """
    from PIL import ExifTags, Image, ImageOps

    source, name = image, image
    if isinstance(image, dict):
        data, name = image.get("bytes"), image.get("path") or "in memory"
        source = image.get("path") if data is None else data
        source = io.BytesIO(source) if isinstance(source, bytes) else source
    if not isinstance(source, Image.Image | str | os.PathLike | io.BytesIO):
        raise ValueError(f"image is {image!r:.80}, expected a PIL image, a path, or a dict of its `bytes` or `path`")
    try:
        picture = source if isinstance(source, Image.Image) else Image.open(source)
        if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:
            ground = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(ground, picture.convert("RGBA"))
        return picture.convert("RGB")
    except Exception as error:  # Pillow: whatever a decoder meets in a broken file, SyntaxError in a broken PNG
        raise ValueError(f"cannot read image {name}: {error}") from error
