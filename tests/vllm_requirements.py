"""Prints what vLLM's wheel for processors needs to write text, one requirement a line: `python THIS_FILE WHEEL`.

Left out: torch, which must be of one version and is installed before, and what only pictures and sound need.
"""

from __future__ import annotations

import re
import sys
import zipfile
from email.parser import Parser

LEFT_OUT = ("torch", "torchaudio", "torchcodec", "torchvision")


def requirements(wheel: str) -> list[str]:
    """Return the wheel's requirements, extras apart."""
    with zipfile.ZipFile(wheel) as files:
        name = next(name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        described = Parser().parsestr(files.read(name).decode())
    needed = [line for line in described.get_all("Requires-Dist", []) if "extra ==" not in line]
    return [line for line in needed if re.match(r"[\w.-]+", line)[0] not in LEFT_OUT]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
