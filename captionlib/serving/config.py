"""What the web application allows."""

from dataclasses import dataclass

from captionlib.errors import ConfigError

__all__ = ["ServingConfig"]


@dataclass(frozen=True)
class ServingConfig:
    """Limits of the web application.

    Attributes:
        hosts: names that it answers to, without ports: a page of somebody else's cannot point a name of its own here.
        max_upload_bytes: of a photograph.
        max_question_characters: longer questions are refused.
        max_rows: of one answer.
        max_offset: how far one may turn pages.
        max_photos: that are looked at, or fetched for a thumbnail, at a time; more are told to come back.
        max_image_pixels: width x height of images that are decoded.
        image_timeout_seconds: for fetching one image, and for decoding it.
        thumbnail_bytes: of all thumbnails that are kept on disk.
        allow_private_hosts: fetch images also from hosts that are not public. Whoever made the data set chose their
            addresses, and visitors see what is there.
    """

    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "::1", "[::1]")
    max_upload_bytes: int = 16 * 2**20
    max_question_characters: int = 500
    max_rows: int = 100
    max_offset: int = 10_000
    max_photos: int = 16
    max_image_pixels: int = 50_000_000
    image_timeout_seconds: float = 10.0
    thumbnail_bytes: int = 2**30
    allow_private_hosts: bool = False

    def __post_init__(self) -> None:
        for name in ("max_upload_bytes", "max_question_characters", "max_rows", "max_photos", "max_image_pixels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.image_timeout_seconds <= 0:
            raise ConfigError(f"image_timeout_seconds: expected more than 0, got {self.image_timeout_seconds}")
