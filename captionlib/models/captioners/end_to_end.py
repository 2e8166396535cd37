"""Encoder and captioner as one network, from pixels to the log-probabilities of sentences: what is tuned end to end."""

from torch import Tensor, nn

from captionlib.models.captioners.captioner import Captioner, TokenLogProbs
from captionlib.models.encoders.network import EncoderNetwork

__all__ = ["ImageCaptioner"]


class ImageCaptioner(nn.Module):
    """A captioner that sees images, not features.

    Args:
        encoder: trainable; see `EncoderNetwork`.
        captioner: at home with its features.
    """

    def __init__(self, encoder: EncoderNetwork, captioner: Captioner) -> None:
        super().__init__()
        self.encoder = encoder
        self.captioner = captioner

    def forward(
        self, pixels: Tensor, captions: Tensor, image_of_sentence: Tensor, mean_log_probs: bool = False
    ) -> TokenLogProbs:
        """Scores captions; see `Captioner`. Each image is encoded once, whatever the number of its captions.

        In training the features are as they are computed, so that gradients reach the encoder; in evaluation as they
        are stored.

        Args:
            pixels: `[images, crop_size, crop_size, 3] uint8`.
            captions: `[sentences, ticks] int64`.
            image_of_sentence: `[sentences] int64`, the row of `pixels` that a caption belongs to.
            mean_log_probs: give them too.
        """
        features = self.encoder(pixels) if self.training else self.encoder.encode(pixels).float()
        scores: TokenLogProbs = self.captioner(features, captions, image_of_sentence, mean_log_probs)
        return scores
