"""The limits of the web application."""

from pydantic import PositiveFloat, PositiveInt

from captionlib.config import configclass

__all__ = ["ServingConfig"]


@configclass
class ServingConfig:
    """The limits of the web application.

    Attributes:
        allowed_hosts: the host names, without ports, that requests may be for. Prevents DNS rebinding: a foreign page
            cannot reach the application through a name of its own.
        max_upload_bytes: the maximum size of an uploaded image.
        max_concurrent_images: the maximum number of uploaded images, and of thumbnails, being processed at once;
            further requests are answered with 503.
        max_image_pixels: the maximum width x height of images to decode.
        image_timeout_seconds: the timeout for fetching an image, and for decoding it.
        max_thumbnail_bytes: the maximum size of all thumbnails on disk.
        allow_private_hosts: fetch images also from hosts that are not public. The author of the dataset chose the
            addresses of the images, and visitors see what is stored there.
    """

    allowed_hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "::1", "[::1]")
    max_upload_bytes: PositiveInt = 16 * 2**20
    max_concurrent_images: PositiveInt = 16
    max_image_pixels: PositiveInt = 50_000_000
    image_timeout_seconds: PositiveFloat = 10.0
    max_thumbnail_bytes: PositiveInt = 2**30
    allow_private_hosts: bool = False
