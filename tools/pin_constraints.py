"""Print constraints.txt: exact versions of all that megatron-prolong installs, as they are in this environment.

python tools/pin_constraints.py > tools/constraints.txt
"""

from __future__ import annotations

import importlib.metadata
import re

from packaging.requirements import Requirement

APART = {"megatron-prolong", "torch", "triton"}  # torch differs between the CPU and the GPU image


def installed(name: str, found: dict[str, str]) -> None:
    """Add `name` and all that it requires to `found`."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found:
        return
    distribution = importlib.metadata.distribution(name)
    found[key] = distribution.version
    for text in distribution.requires or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            installed(requirement.name, found)


def main() -> None:
    """Print the pins in alphabetical order."""
    found: dict[str, str] = {}
    installed("megatron-prolong", found)
    print("# Written by tools/pin_constraints.py: what the tests last ran with on Python 3.11.")
    for name in sorted(found.keys() - APART):
        print(f"{name}=={found[name].split('+')[0]}")


if __name__ == "__main__":
    main()
