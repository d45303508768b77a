"""A bundle's files ⇄ the networks they hold, and the model that the stream works with."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from tokenizers import Tokenizer
from torch import Tensor, nn

from models.blip_matching import BlipScorer
from models.bundle import Manifest
from models.captioner import Captioner, CaptionerConfig
from models.captioning import at_once, generate_from_tokens, quantised, steps_of
from models.clustering import Clustering
from models.device import choose_device
from models.device_clustering import DeviceClustering
from models.drift import Baseline
from models.encoding import PaddedEncoder
from models.errors import BundleError, ModelError, ShapeError
from models.images import decode
from models.matching import MatchingHead, OwnScorer, Scorer
from models.model import Picture, Vectors
from models.stepwise import Steps
from models.vocabulary import Vocabulary

# The output layer shares its weights with the input embeddings; safetensors stores no tensor twice.
TIED = ("bert.cls.predictions.decoder.weight", "bert.cls.predictions.decoder.bias")

# A worker hands over so many of the encoder's batches at once: one is decoded while another is encoded, and a quarter of them
# all, which is what the quota keeps by default, is captioned together (on two cores 64 captions/s by fours, 244 by 32).
PARTS = 4


class CaptionerParts:
    """Captioner, vocabulary and matching head, to and from the files of a bundle."""

    def __init__(self, captioner: Captioner, vocabulary: Vocabulary, matching: MatchingHead) -> None:
        self.captioner = captioner
        self.vocabulary = vocabulary
        self.matching = matching

    def contents(self) -> dict[str, bytes]:
        """File name → bytes. Encoder and decoder in half precision; what decides an index vector in full."""
        decoder = {k: v for k, v in self.captioner.decoder.state_dict().items() if k not in TIED}
        return {
            "encoder.safetensors": _saved(self.captioner.encoder.state_dict(), torch.float16),
            "codebook.safetensors": _saved(self.captioner.quantiser.state_dict(), torch.float32),
            "decoder.safetensors": _saved(decoder, torch.float16),
            "matching.safetensors": _saved(self.matching.state_dict(), torch.float32),
            "tokenizer.json": self.vocabulary.tokenizer.to_str().encode(),
        }

    @staticmethod
    def of(manifest: Manifest, contents: Mapping[str, bytes]) -> "CaptionerParts":
        """The networks, on the CPU. Raises BundleError where tensors and configuration do not belong together."""
        try:
            captioner = Captioner(CaptionerConfig(**manifest.data["config"]))
            vocabulary = Vocabulary(Tokenizer.from_str(contents["tokenizer.json"].decode()))
            config = captioner.config
            matching = MatchingHead(config.codes, config.code_width, config.vocabulary)
        except (TypeError, ValueError, KeyError, ModelError) as error:
            raise BundleError(f"the bundle's configuration is of another version of this software: {error}") from error
        _load(captioner.encoder, contents, "encoder.safetensors")
        _load(captioner.quantiser, contents, "codebook.safetensors")
        _load(captioner.decoder, contents, "decoder.safetensors", may_miss=TIED)
        _load(matching, contents, "matching.safetensors")
        return CaptionerParts(captioner.eval(), vocabulary, matching.eval())


def clusters_content(clustering: Clustering) -> bytes:
    """clusters.safetensors of a bundle."""
    return save_arrays({"centroids": clustering.centroids, "centre": clustering.centre, "axes": clustering.axes})


def centroids_content(centroids: NDArray[np.float32]) -> bytes:
    """clusters.safetensors of clusters that are not of codes: for comparison only."""
    return save_arrays({"centroids": centroids})


class LoadedCaptioner:
    """A captioner at work, with or without clusters: all of models.model.PairModel but `assign`, as it is promised there."""

    def __init__(self, parts: CaptionerParts, device: torch.device, scorer: Scorer | None = None) -> None:
        """scorer  the bundle's own head if it is None."""
        config = parts.captioner.config
        self.tokens, self.codebook_size = config.tokens, config.codes
        self._sees_images = config.conditioned_on == "image"
        self._side = config.side
        self._captioner = parts.captioner.to(device).eval()
        self._steps: Steps | None = None  # made by the first that captions: a GPU needs seconds
        self._vocabulary = parts.vocabulary
        codes = self._captioner.quantiser.codebook.codes
        self._scorer: Scorer = scorer or OwnScorer(parts.matching.to(device).eval(), parts.vocabulary, codes)
        self._judged_side = scorer.side if isinstance(scorer, BlipScorer) else None
        self._encoder = PaddedEncoder(parts.captioner, device)
        parts.captioner.decoder.to(self._encoder.dtype)
        self.batch = self._encoder.batch
        self.pairs_at_once = PARTS * self.batch
        self.fingerprint = self._encoder.fingerprint()

    @property
    def needs_pictures(self) -> bool:
        """Whether `match` or `caption` looks at more than index vectors."""
        return self._sees_images or self._judged_side is not None

    def decode(self, image: bytes | memoryview) -> Picture:
        """Pixels in the encoder's size, and in a BLIP's where one judges."""
        pixels = decode(image, self._side)
        return Picture(pixels, None if self._judged_side is None else decode(image, self._judged_side))

    def encode(self, pictures: Sequence[Picture]) -> Vectors:
        """(n, L) index vectors."""
        return self._encoder.vectors([p.pixels for p in pictures])

    def features(self, pictures: Sequence[Picture]) -> NDArray[np.float32]:
        """(n, L, F) of the encoder."""
        return self._encoder.features([p.pixels for p in pictures])

    def match(self, vectors: Vectors, captions: Sequence[str], pictures: Sequence[Picture] = ()) -> NDArray[np.float32]:
        """(n,) scores in [0, 1]."""
        return self._scorer.scores(vectors, captions, pictures)

    def caption(self, vectors: Vectors, pictures: Sequence[Picture] = ()) -> list[str]:
        """One generated caption a row."""
        captions: list[str] = []
        if self._steps is None and len(vectors):
            self._steps = steps_of(self._captioner)
        for seen in self.seen(vectors, pictures):
            captions += generate_from_tokens(self._captioner, self._vocabulary, seen, steps=self._steps)
        return captions

    def seen(self, vectors: Vectors, pictures: Sequence[Picture] = ()) -> Iterator[Tensor]:
        """(b, L, D) what the decoder is shown of each image, a bounded part at a time: its codes (paper), or its tokens.

        Tokens are computed again from the picture instead of being kept from `encode`: of a batch of pairs only the kept
        ones need them, and as floats they are a thousand times as large as the vectors.
        """
        if not self._sees_images:
            yield from quantised(self._captioner, vectors)
            return
        if len(pictures) != len(vectors):
            raise ShapeError("this captioner's decoder is shown the image's own tokens: pass the pictures, too")
        for tokens in self._encoder.image_tokens([p.pixels for p in pictures]):
            yield from tokens.split(at_once(tokens.device))


class LoadedModel(LoadedCaptioner):
    """models.model.PairModel of a bundle."""

    def __init__(
        self, manifest: Manifest, parts: CaptionerParts, clustering: Clustering, device: torch.device,
        scorer: Scorer | None = None,
    ) -> None:  # fmt: skip
        super().__init__(parts, device, scorer)
        self.manifest = manifest
        self.version = manifest.version[:16]
        self.space = manifest.space
        self.clusters = len(clustering.centroids)
        gate = manifest.data.get("gate")
        self.gate: float | None = None if gate is None else float(gate)
        self.made_with: dict[str, str] = manifest.data.get("fingerprint", {})
        self.clustering: Clustering | None = clustering
        self.baseline: Baseline | None = Baseline.of(manifest.data)
        self._clustering = clustering
        self._on_device = _on_device(clustering, device)

    @staticmethod
    def of(
        manifest: Manifest, contents: Mapping[str, bytes], device: str | None = None, *, blip: Path | None = None,
        matching: bool = True,
    ) -> "LoadedModel":  # fmt: skip
        """From the checked files of a bundle; `load_model` says what the options mean."""
        if problem := manifest.unfit_for_streams:
            raise BundleError(problem)
        parts = CaptionerParts.of(manifest, contents)
        clustering = _clustering_in(manifest, contents, parts.captioner)
        chosen, scorer = choose_device(device), None
        if blip is not None and manifest.blip is None:
            raise BundleError("the bundle scores pairs with its own head: it has no BLIP that could lie elsewhere")
        if matching and manifest.blip is not None:
            folder, files = manifest.blip
            scorer = BlipScorer(blip or folder, chosen, files)
        return LoadedModel(manifest, parts, clustering, chosen, scorer)

    def with_clusters(self, manifest: Manifest, contents: Mapping[str, bytes]) -> "LoadedModel":
        """The model of another bundle with the same networks, which the two then share. Raises BundleError."""
        if problem := manifest.unfit_for_streams:
            raise BundleError(problem)
        other = copy.copy(self)
        other.manifest, other.version = manifest, manifest.version[:16]
        other.made_with = manifest.data.get("fingerprint", {})
        other.clustering = other._clustering = _clustering_in(manifest, contents, self._captioner)
        other.baseline = Baseline.of(manifest.data)
        other.clusters = len(other._clustering.centroids)
        other._on_device = _on_device(other._clustering, self._encoder.device)
        return other

    def assign(self, vectors: Vectors) -> NDArray[np.int32]:
        """(n,) clusters."""
        return (self._on_device or self._clustering).assign(vectors)


def _on_device(clustering: Clustering, device: torch.device) -> DeviceClustering | None:
    return None if device.type == "cpu" else DeviceClustering(clustering, device)


def _clustering_in(manifest: Manifest, contents: Mapping[str, bytes], captioner: Captioner) -> Clustering:
    try:
        arrays = load_arrays(contents["clusters.safetensors"])
        codebook = captioner.quantiser.codebook.codes.cpu().numpy()
        return clustering_of(manifest.data["clustering"], arrays, codebook)
    except (KeyError, SafetensorError) as error:
        raise BundleError(f"clusters.safetensors is not what this version of the software reads: {error}") from error


def clustering_of(
    about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], codebook: NDArray[np.float32]
) -> Clustering:
    """The clustering of a bundle: its arrays, its form, and the grid of its codebook."""
    from models.clustering import GRID

    grid = np.rint(codebook.astype(np.float64) * GRID["mean"])
    return Clustering(about["form"], arrays["centroids"], grid, arrays["centre"], arrays["axes"])


def _saved(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> bytes:
    plain = {
        k: v.detach().cpu().to(dtype).contiguous() if v.is_floating_point() else v.cpu() for k, v in tensors.items()
    }
    return bytes(save_tensors(plain))


def _load(module: nn.Module, contents: Mapping[str, bytes], name: str, may_miss: Sequence[str] = ()) -> None:
    try:
        tensors = {k: v.float() if v.is_floating_point() else v for k, v in load_tensors(contents[name]).items()}
        result = module.load_state_dict(tensors, strict=False)
    except (KeyError, SafetensorError, RuntimeError) as error:
        raise BundleError(
            f"{name} does not fit the bundle's configuration: {' '.join(str(error).split())[:200]}"
        ) from error
    if wrong := [k for k in [*result.missing_keys, *result.unexpected_keys] if k not in may_miss]:
        raise BundleError(f"{name} does not fit the bundle's configuration: tensor {wrong[0]} is missing or unknown")
