"""The limits of the web application."""

from pydantic import PositiveFloat, PositiveInt

from captionlib.config import configclass

__all__ = ["ServingConfig"]


@configclass
class ServingConfig:
    """The limits of the web application.

    Attributes:
        allowed_hosts: host names, without ports, accepted in the Host header of requests. This prevents DNS rebinding,
            in which a malicious site points its own host name at this server.
        max_upload_bytes: maximum total size of the images uploaded by a request.
        max_concurrent_uploads: maximum number of uploaded images that are processed at once.
        max_waiting_uploads: maximum number of uploaded images that wait to be processed. Clients take turns. If too
            many images wait, the latest image of the client with the most waiting images is rejected with status 503.
        max_concurrent_fetches: maximum number of images to fetch at once for thumbnails. At most a quarter of them can
            be from the same host. A request that waits for more than five seconds fails with status 503.
        max_requests_per_client: maximum number of concurrent requests per client. Further requests fail with status
            429. If a proxy in front of the server does not pass on client addresses, all clients count as one.
        body_timeout_seconds: timeout for receiving a request body. Each 16 KiB received extends it by one second.
        max_image_pixels: maximum number of pixels (width x height) of images to decode.
        image_timeout_seconds: timeout for fetching an image, and separately for decoding it.
        max_thumbnail_bytes: maximum total size of thumbnails on disk, enforced after every 200 new thumbnails.
        max_exported_images: maximum number of images that a visitor can select and save.
        max_export_bytes: maximum total size of the images in a WebDataset (tar file) that a visitor saves. Further
            images are left out, and a file in the tar lists them.
        max_concurrent_exports: maximum number of WebDatasets that are saved at once. Further requests fail with status
            503.
        allow_private_hosts: whether to also fetch images from hosts that are not public. Enable this only if you trust
            the author of the dataset, who chose the image URLs: visitors can view the images at these URLs.
        log_requests: whether to write a line of JSON to standard error for each request.
    """

    allowed_hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "::1", "[::1]")
    max_upload_bytes: PositiveInt = 16 * 2**20
    max_concurrent_uploads: PositiveInt = 4
    max_waiting_uploads: PositiveInt = 64
    max_concurrent_fetches: PositiveInt = 32
    max_requests_per_client: PositiveInt = 64
    body_timeout_seconds: PositiveFloat = 20.0
    max_image_pixels: PositiveInt = 50_000_000
    image_timeout_seconds: PositiveFloat = 10.0
    max_thumbnail_bytes: PositiveInt = 2**30
    max_exported_images: PositiveInt = 1000
    max_export_bytes: PositiveInt = 2**30
    max_concurrent_exports: PositiveInt = 2
    allow_private_hosts: bool = False
    log_requests: bool = False
