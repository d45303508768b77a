"""Debian packages as sources of free images: fetched by name, unpacked without root. Knows nothing of images."""

import subprocess
from pathlib import Path

PACKAGES = ("openclipart-svg", "tuxpaint-stamps-default")


class CorpusBuildError(Exception):
    """A package that cannot be fetched or unpacked, in one line that says what to do."""


def fetch(package: str, into: Path) -> Path:
    """The newest .deb of `package` in `into`; one that lies there already is taken as it is, without a network."""
    into.mkdir(parents=True, exist_ok=True)
    if found := sorted(into.glob(f"{package}_*.deb")):
        return found[-1]
    try:
        subprocess.run(["apt-get", "download", "-q", package], cwd=into, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CorpusBuildError(
            f"cannot fetch the Debian package {package} ({error}); download it by hand and pass its folder as --debs"
        ) from error
    found = sorted(into.glob(f"{package}_*.deb"))
    if not found:
        raise CorpusBuildError(f"apt-get download {package} left no .deb in {into}")
    return found[-1]


def unpack(deb: Path, into: Path) -> Path:
    """`deb` unpacked under `into`, once; returns the folder."""
    folder = into / deb.stem
    if not folder.exists():
        partial = into / f"{deb.stem}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["dpkg", "-x", str(deb), str(partial)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CorpusBuildError(f"cannot unpack {deb.name} ({error}); dpkg must be installed") from error
        partial.rename(folder)
    return folder
