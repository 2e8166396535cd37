"""Imports torchvision without torch._dynamo, which takes longer to import than everything else together.

torchvision's `roi_align`, which encoders do not use, needs one function of torch._dynamo.
"""

import sys
from types import ModuleType

__all__ = ["create_feature_extractor", "get_graph_node_names", "torchvision"]

_DYNAMO = "torch._dynamo.utils"


def _is_compile_supported(device_type: str) -> bool:
    from torch._dynamo.utils import is_compile_supported

    supported: bool = is_compile_supported(device_type)
    return supported


_placeholder = ModuleType(_DYNAMO)
_placeholder.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
_found = sys.modules.setdefault(_DYNAMO, _placeholder)
try:
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
finally:
    if _found is _placeholder:
        del sys.modules[_DYNAMO]
