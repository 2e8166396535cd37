"""Encoder and captioner as one network, from pixels to log-probabilities, for end-to-end fine-tuning."""

from torch import Tensor, nn

from captionlib.models.captioners.captioner import CaptionerNetwork, TokenLogProbs
from captionlib.models.encoders.network import EncoderNetwork

__all__ = ["ImageCaptioner"]


class ImageCaptioner(nn.Module):
    """A captioner whose input is pixels.

    Args:
        encoder: the encoder to fine-tune; see `EncoderNetwork`.
        captioner: a captioner that was trained on features of this encoder.
    """

    def __init__(self, encoder: EncoderNetwork, captioner: CaptionerNetwork) -> None:
        super().__init__()
        self.encoder = encoder
        self.captioner = captioner

    def forward(
        self, pixels: Tensor, captions: Tensor, image_of_caption: Tensor, mean_log_probs: bool = False
    ) -> TokenLogProbs:
        """Computes the log-probability of each token; see `CaptionerNetwork.forward`.

        `pixels` is `[images, crop_size, crop_size, 3] uint8`. In evaluation mode, features are rounded to the dtype in
        which a features dataset stores them.
        """
        features = self.encoder(pixels) if self.training else self.encoder.encode(pixels).float()
        log_probs: TokenLogProbs = self.captioner(features, captions, image_of_caption, mean_log_probs)
        return log_probs
