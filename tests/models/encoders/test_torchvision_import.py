import subprocess
import sys

SCRIPT = """
import sys
import captionlib.models.encoders.encoder
assert "torchvision" in sys.modules
assert not {"torch._dynamo", "torch._dynamo.utils"} & set(sys.modules), "imported torch._dynamo"
"""


def test_encoders_import_torchvision_without_dynamo() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
