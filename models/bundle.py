"""The model bundle on disk: a folder of safetensors, tokenizer and manifest, immutable, named by the hash of its content.

Nothing in a bundle is ever unpickled or executed, and nothing of it is used before its SHA-256 has been compared.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import BundleError

if TYPE_CHECKING:
    from models.model import PairModel

FORMAT = 2  # 2: the scorer may be a BLIP checkpoint, which the manifest names ("itm")
READABLE_FORMATS = (1, 2)
MANIFEST = "manifest.json"
# What decides an index vector and the gate's score: bundles that agree in these can replace each other in a stream.
SPACE_FILES = ("encoder.safetensors", "codebook.safetensors", "matching.safetensors", "tokenizer.json")
CAPTIONER_FILES = (*SPACE_FILES, "decoder.safetensors")
BUNDLE_FILES = (*CAPTIONER_FILES, "clusters.safetensors")
READABLE = (".safetensors", ".json")


@dataclass(frozen=True)
class Manifest:
    """What a bundle says about itself. `data` is the whole of it, `version` the SHA-256 of the rest."""

    data: Mapping[str, Any]

    @property
    def version(self) -> str:
        """64 hex digits; 16 are shown."""
        return str(self.data["version"])

    @property
    def space(self) -> str:
        """Hash of encoder, codebook, scorer and gate."""
        return str(self.data["space"])

    @property
    def blip(self) -> tuple[Path, Mapping[str, str]] | None:
        """(folder, SHA-256 of each file) of the BLIP checkpoint that scores pairs; None where the bundle's own head does."""
        about = self.data.get("itm", {})
        return (Path(about["folder"]), dict(about["files"])) if about.get("scorer") == "blip" else None

    @property
    def complete(self) -> bool:
        """Whether it has clusters: a captioner that `train` wrote has none yet."""
        return "clusters.safetensors" in self.data["files"]

    @property
    def unfit_for_streams(self) -> str | None:
        """Why no worker can use its clusters; None where one can."""
        feature = self.data.get("clustering", {}).get("feature", "codes")
        if feature == "codes":
            return None
        return (
            f"clusters of the feature {feature} cannot serve a stream, which records code indices and decides by them "
            "alone: run `tldr-stream bootstrap --feature codes`"
        )


def read_manifest(path: Path | str) -> Manifest:
    """The manifest of the bundle folder `path`, its own hash checked (the files' hashes are not).

    Raises BundleError where there is none, or where it was changed or is of another format.
    """
    file = Path(path) / MANIFEST
    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise BundleError(f"{path} is no model bundle: {file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise BundleError(f"{file} is damaged: it is not JSON; fetch the bundle again") from error
    if (
        not isinstance(data, dict)
        or data.get("format") not in READABLE_FORMATS
        or not isinstance(data.get("files"), dict)
    ):
        raise BundleError(
            f"{file} is not of format {' or '.join(map(str, READABLE_FORMATS))}: it belongs to another version of this software"
        )
    if data.get("version") != content_hash({k: v for k, v in data.items() if k != "version"}):
        raise BundleError(f"{file} is damaged: its content does not have its own hash; fetch the bundle again")
    return Manifest(data)


def read_files(path: Path | str, wanted: Collection[str] | None = None) -> tuple[Manifest, dict[str, bytes]]:
    """Manifest and content of the `wanted` files (None: of all), after every file was compared with its SHA-256.

    Raises BundleError with the name of the first file that is missing, damaged, or of a kind that could execute code.
    """
    manifest = read_manifest(path)
    contents = {}
    for name, about in sorted(manifest.data["files"].items()):
        if Path(name).name != name or Path(name).suffix not in READABLE:
            raise BundleError(f"{path} names {name!r}: a bundle holds {' and '.join(READABLE)} files and nothing else")
        try:
            with (Path(path) / name).open("rb") as file:
                if wanted is None or name in wanted:
                    contents[name] = file.read()
                    digest = hashlib.sha256(contents[name]).hexdigest()
                else:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BundleError(f"{path}: {name} cannot be read ({error.strerror}); fetch the bundle again") from error
        if digest != about["sha256"]:
            raise BundleError(f"{path}: {name} is damaged (its SHA-256 is not the manifest's); fetch the bundle again")
    return manifest, contents


def write_bundle(out: Path | str, contents: Mapping[str, bytes], about: Mapping[str, Any]) -> Manifest:
    """Write a bundle folder as a whole, or not at all; an older one at `out` is replaced.

    contents  file name → bytes, from BUNDLE_FILES (CAPTIONER_FILES without clusters)
    about     all else the manifest shall say: config, gate, itm, clustering, baselines, training …
    """
    out = Path(out)
    files = {n: {"sha256": hashlib.sha256(c).hexdigest(), "bytes": len(c)} for n, c in sorted(contents.items())}
    decides = {"files": {n: files[n] for n in SPACE_FILES}, "config": about["config"], "gate": about.get("gate")}
    if about.get("itm", {}).get("scorer") == "blip":  # wherever its folder lies
        decides["itm"] = about["itm"]["files"]
    space = content_hash(decides)
    data: dict[str, Any] = {"format": FORMAT, "space": space, "files": files, **about}
    data["version"] = content_hash(data)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        partial.chmod(0o755)
        for name, content in contents.items():
            (partial / name).write_bytes(content)
        (partial / MANIFEST).write_text(json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
        if (out / MANIFEST).exists():
            shutil.rmtree(out)  # only what is a bundle is ever replaced
        partial.rename(out)
    except OSError as error:
        raise BundleError(f"cannot write the bundle {out}: {error.strerror}; is it another kind of folder?") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Manifest(data)


def load_model(
    path: Path | str, device: str | None = None, *, blip: Path | None = None, matching: bool = True
) -> "PairModel":
    """The bundle `path`, ready to work on `device` (default: a GPU where there is one). Checks every hash first.

    blip      where the BLIP checkpoint of the bundle lies, if not where it was when the bundle was made
    matching  False: `match` will not be asked for, so a BLIP need not be there
    Raises BundleError in one line: what is wrong with which file, and what to do.
    """
    manifest, contents = read_files(path)
    if missing := [n for n in BUNDLE_FILES if n not in contents]:
        raise BundleError(f"{path} has no {missing[0]}: run `tldr-stream bootstrap` on it to make it a whole bundle")
    from models.loaded import LoadedModel

    return LoadedModel.of(manifest, contents, device, blip=blip, matching=matching)


def load_beside(
    path: Path | str, live: "PairModel", device: str | None = None, *, blip: Path | None = None
) -> "PairModel":
    """The bundle `path`, to take over from the model `live`: only its clusters are loaded where the networks are the same.

    blip  as in `load_model`. Checks every hash first. Raises BundleError, and where encoder, codebook or gate are others.
    """
    from models.loaded import LoadedModel

    manifest = read_manifest(path)
    if manifest.space != live.space:
        raise BundleError(
            f"bundle {manifest.version[:12]} has another encoder, codebook or gate: start another --stream on the same raw "
            "topic with it, which is then reduced from its beginning"
        )
    decoder = manifest.data["files"].get("decoder.safetensors")
    if not isinstance(live, LoadedModel) or decoder != live.manifest.data["files"]["decoder.safetensors"]:
        return load_model(path, device, blip=blip)
    manifest, contents = read_files(path, ["clusters.safetensors"])
    if not manifest.complete:
        raise BundleError(f"{path} has no clusters: run `tldr-stream bootstrap` on it to make it a whole bundle")
    return live.with_clusters(manifest, contents)


def content_hash(value: object) -> str:
    """SHA-256 of `value` as canonical JSON."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
