"""`train`: stage 1 of TL;DR, from noisy and clean pairs to a captioner folder that `bootstrap` makes a bundle of.

Must not know Kafka; how a captioner learns is models/training.py's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stream.errors import TldrError
from stream.pair_sources import BadEntry, open_source

if TYPE_CHECKING:
    from models.training import TrainingPair


@dataclass(frozen=True)
class TrainResult:
    """A captioner on disk."""

    out: Path
    version: str
    noisy_pairs: int
    clean_pairs: int
    excluded_pairs: int
    language_loss: float
    codes_used: int
    code_perplexity: float

    def lines(self) -> Iterator[str]:
        """For a person."""
        yield f"captioner {self.version[:16]} in {self.out}"
        yield f"trained on {self.noisy_pairs:,} noisy and {self.clean_pairs:,} clean pairs, {self.excluded_pairs:,} held out"
        yield f"language loss {self.language_loss:.3f}; {self.codes_used} codes used, perplexity {self.code_perplexity:.0f}"
        yield f"next: tldr-stream bootstrap SOURCE --captioner {self.out} --out BUNDLE"


def train(
    noisy: Sequence[str],
    clean: Sequence[str],
    out: Path,
    *,
    architecture: str = "paper",
    exclude: Sequence[str] = (),
    codes: int | None = None,
    epochs_noisy: int | None = None,
    epochs_clean: int | None = None,
    text_encoder: Path | None = None,
    encoder_weights: Path | None = None,
    cache: Path | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Callable[[str], None] = print,
) -> TrainResult:
    """Train a captioner on the pairs of `noisy` sources, then on those of `clean` ones, and write it to `out`.

    exclude  sources whose pairs are held out: every id in them is left out of the training data.
    cache    folder for the features of a frozen encoder: a second training with the same images starts at once.
    Raises   TldrError for an unknown architecture; ModelError for too little data or missing weights.
    """
    import torch

    from models.bundle import write_bundle
    from models.captioner import ARCHITECTURES, sized
    from models.device import choose_device, fingerprint
    from models.encoding import BATCH
    from models.loaded import CaptionerParts
    from models.text_embeddings import TextEncoder, packaged_text_encoder
    from models.training import TrainingConfig, manifest_of, train_captioner

    if architecture not in ARCHITECTURES:
        raise TldrError(f'architecture "{architecture}" is unknown: choose one of {", ".join(ARCHITECTURES)}')
    if threads is not None:
        torch.set_num_threads(threads)
    defaults = TrainingConfig()
    training = TrainingConfig(
        epochs_noisy=defaults.epochs_noisy if epochs_noisy is None else epochs_noisy,
        epochs_clean=defaults.epochs_clean if epochs_clean is None else epochs_clean,
        seed=seed,
    )
    config = ARCHITECTURES[architecture]
    held_out = {pair.id for source in exclude for pair in _pairs(source)}
    noisy_pairs, clean_pairs = ([p for s in sources for p in _pairs(s)] for sources in (noisy, clean))
    kept_noisy, kept_clean = ([p for p in pairs if p.id not in held_out] for pairs in (noisy_pairs, clean_pairs))
    trained = train_captioner(
        sized(config, vocabulary=config.vocabulary, codes=codes), training, kept_noisy, kept_clean,
        TextEncoder(text_encoder or packaged_text_encoder()), encoder_weights, cache, progress,
    )  # fmt: skip
    parts = CaptionerParts(trained.captioner.cpu(), trained.vocabulary, trained.matching)
    about = {
        "architecture": architecture,
        "config": trained.captioner.config.as_dict(),
        "fingerprint": fingerprint(choose_device(), BATCH),
        **manifest_of(trained),
    }
    manifest = write_bundle(out, parts.contents(), about)
    last = trained.epochs[-1]
    return TrainResult(
        out, manifest.version, trained.pairs["noisy"], trained.pairs["clean"],
        len(noisy_pairs) + len(clean_pairs) - len(kept_noisy) - len(kept_clean),
        last.language_loss, last.usage.used, last.usage.perplexity,
    )  # fmt: skip


def _pairs(source: str) -> Iterator[TrainingPair]:
    """The pairs of a source that carry their image; whatever else lies in it is passed over."""
    from models.training import TrainingPair

    for entry in open_source(source):
        if not isinstance(entry, BadEntry) and entry.image is not None:
            yield TrainingPair(entry.id, entry.caption, entry.image)
